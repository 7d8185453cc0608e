// Checks of a launcher's arguments, and of CUDA's answers. pybind11 turns them into ValueError and RuntimeError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace nemo {

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// A checked expression as Python knows the argument: without the struct that it is a member of.
constexpr std::string_view argument(std::string_view expression) {
    for (char c : expression) {
        if (c != '_' && c != '.' && !(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'z')) return expression;
    }
    return expression.substr(expression.rfind('.') + 1);  // all of it without a dot: npos + 1 is 0
}

constexpr int64_t MOST_ELEMENTS = int64_t(1) << 39;  // of a stride: 40 bits of bytes are what the copy engine takes

}  // namespace nemo

// CHECK(condition, "what was expected, and the value"): ValueError.
#define CHECK(condition, ...)                                                   \
    do {                                                                        \
        if (!(condition)) throw std::invalid_argument(nemo::text(__VA_ARGS__)); \
    } while (0)

// The argument's name, what was expected and what came: CHECK_EQ(width, 128), CHECK_MULTIPLE(hidden, 8), ...
#define CHECK_EQ(name, expected) \
    CHECK((name) == (expected), nemo::argument(#name), " must be ", expected, ", got ", name)
#define CHECK_RANGE(name, low, high) \
    CHECK((name) >= (low) && (name) <= (high), nemo::argument(#name), " must be ", low, " to ", high, ", got ", name)
#define CHECK_MULTIPLE(name, factor) \
    CHECK((name) % (factor) == 0, nemo::argument(#name), " must be a multiple of ", factor, ", got ", name)
// Elements between rows.
#define CHECK_STRIDE(name, factor)              \
    do {                                        \
        CHECK_RANGE(name, 0, nemo::MOST_ELEMENTS); \
        CHECK_MULTIPLE(name, factor);           \
    } while (0)
// A pointer to what is `bytes` aligned: not null, or null for what may be left out.
#define CHECK_ALIGNED(name, bytes)                                                                               \
    CHECK((name) != nullptr && reinterpret_cast<uintptr_t>(name) % (bytes) == 0, nemo::argument(#name), " must be ", \
          bytes, "-byte aligned and not null, got ", static_cast<const void*>(name))
#define CHECK_OPTIONAL(name, bytes)                                                                                  \
    CHECK(reinterpret_cast<uintptr_t>(name) % (bytes) == 0, nemo::argument(#name), " must be ", bytes, \
          "-byte aligned or null, got ", static_cast<const void*>(name))
// A pointer that 16-byte accesses may use.
#define CHECK_POINTER(name) CHECK_ALIGNED(name, 16)

#ifndef NEMO_EMULATED
#define CHECK_CUDA(call)                                                                        \
    do {                                                                                        \
        cudaError_t answer = (call);                                                            \
        if (answer != cudaSuccess) {                                                            \
            const char *name = cudaGetErrorName(answer), *words = cudaGetErrorString(answer);   \
            throw std::runtime_error(nemo::text(#call ": ", name, ", ", words));                \
        }                                                                                       \
    } while (0)
#endif
