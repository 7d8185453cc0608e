// What the bindings of all families share. Seen by the C++ compiler only, so nothing of CUDA is included.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace nemo {

// An address as Python hands it over; 0 is null.
template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A function of the module, with the names of its arguments, which TypeErrors and help() then show.
template <class Function, size_t COUNT>
void define(pybind11::module_& m, const char* name, const char* const (&names)[COUNT], Function function) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        m.def(name, function, pybind11::arg(names[I])...);
    }(std::make_index_sequence<COUNT>{});
}

}  // namespace nemo
