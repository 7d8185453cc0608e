// Number formats in portable C++, bit for bit as the GPU converts them.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>

namespace nemo {

inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of_float(float x) { return std::bit_cast<uint32_t>(x); }

namespace emulated {

// x to a format of `exponent_bits` and `fraction_bits`, to nearest, ties to even, not saturated: the magnitude's bits.
// Beyond the format's finite numbers: the bits that follow its largest, which is infinity where it has one.
inline uint32_t round_magnitude(double x, int fraction_bits, int lowest_exponent) {
    if (x == 0) return 0;
    int exponent;
    std::frexp(x, &exponent);  // x = f * 2^exponent, f in [0.5, 1)
    exponent = std::max(exponent - 1, lowest_exponent);
    double units = std::nearbyint(std::ldexp(x, fraction_bits - exponent));  // to even, the default rounding mode
    return uint32_t(int64_t(exponent - lowest_exponent) << fraction_bits) + uint32_t(units);
}

inline uint16_t bf16_bits(float x) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t fp16_bits(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7FFF;
    if (std::isinf(x)) return sign | 0x7C00;
    return sign | uint16_t(std::min(round_magnitude(std::fabs(double(x)), 10, -14), 0x7C00u));
}
inline uint8_t fp8_bits(float x) {
    uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7F;
    if (std::fabs(x) >= 448.0f) return sign | 0x7E;
    return sign | uint8_t(std::min(round_magnitude(std::fabs(double(x)), 3, -6), 0x7Eu));
}
inline float float_of_bf16(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }
inline float float_of_fp16(uint16_t bits) {
    int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(float(fraction), -24)
                                      : std::ldexp(float(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}
inline float float_of_fp8(uint8_t bits) {
    int exponent = (bits >> 3) & 15, fraction = bits & 7;
    float magnitude = (bits & 0x7F) == 0x7F ? NAN
                      : exponent == 0       ? std::ldexp(float(fraction), -9)
                                            : std::ldexp(float(8 + fraction), exponent - 10);
    return bits & 0x80 ? -magnitude : magnitude;
}

}  // namespace emulated

inline uint32_t pack_bf16(float lo, float hi) {
    return emulated::bf16_bits(lo) | uint32_t(emulated::bf16_bits(hi)) << 16;
}
inline uint32_t pack_fp16(float lo, float hi) {
    return emulated::fp16_bits(lo) | uint32_t(emulated::fp16_bits(hi)) << 16;
}
inline uint16_t pack_fp8(float lo, float hi) {
    return uint16_t(emulated::fp8_bits(lo) | emulated::fp8_bits(hi) << 8);
}
inline float fp16_to_float(uint16_t bits) { return emulated::float_of_fp16(bits); }
inline uint32_t fp8x2_to_fp16x2(uint16_t packed) {
    return pack_fp16(emulated::float_of_fp8(packed & 0xFF), emulated::float_of_fp8(packed >> 8));
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t choice = (selector >> (4 * i)) & 0xF;
        uint32_t byte = (bytes >> (8 * (choice & 7))) & 0xFF;
        if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;  // the sign, replicated
        result |= byte << (8 * i);
    }
    return result;
}

inline float exp2_fast(float x) {
    float y = std::exp2(std::fabs(x) < FLT_MIN ? 0.0f : x);
    return std::fabs(y) < FLT_MIN ? 0.0f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) {
    float y = 1.0f / (std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x);
    return std::fabs(y) < FLT_MIN ? std::copysign(0.0f, y) : y;
}
inline float rsqrt_fast(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace nemo
