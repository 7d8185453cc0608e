// What the bindings of all families share. Seen by the C++ compiler only, so nothing of CUDA is included.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace nemo {

// An address as Python hands it over; 0 is null.
template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace nemo
