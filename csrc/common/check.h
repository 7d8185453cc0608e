// Checks of a launcher's arguments, and of CUDA's answers. pybind11 turns them into ValueError and RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace nemo {

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace nemo

// CHECK(condition, "what was expected, and the value"): ValueError.
#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (!(condition)) throw std::invalid_argument(nemo::text(__VA_ARGS__)); \
    } while (0)

// The argument's name, what was expected and what came: CHECK_EQ(width, 128), CHECK_MULTIPLE(hidden, 8), ...
#define CHECK_EQ(name, expected) \
    CHECK((name) == (expected), #name " must be ", expected, ", got ", name)
#define CHECK_RANGE(name, low, high) \
    CHECK((name) >= (low) && (name) <= (high), #name " must be ", low, " to ", high, ", got ", name)
#define CHECK_MULTIPLE(name, factor) \
    CHECK((name) % (factor) == 0, #name " must be a multiple of ", factor, ", got ", name)
// A pointer that 16-byte accesses may use; null is refused.
#define CHECK_POINTER(name)                                                                                    \
    CHECK((name) != nullptr && reinterpret_cast<uintptr_t>(name) % 16 == 0, #name " must be 16-byte aligned and not null, got ", \
          static_cast<const void*>(name))

#ifndef NEMO_EMULATED
#define CHECK_CUDA(call)                                                                                            \
    do {                                                                                                            \
        cudaError_t answer = (call);                                                                                \
        if (answer != cudaSuccess)                                                                                  \
            throw std::runtime_error(nemo::text(#call ": ", cudaGetErrorName(answer), ", ", cudaGetErrorString(answer))); \
    } while (0)
#endif
