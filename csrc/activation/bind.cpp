// Python's view of csrc/activation.
#include "common/bind.h"
#include "activation/activation.h"

namespace nemo {

void register_activation(pybind11::module_& m) {
    define(m, "silu_mul", {"y", "gate_up", "rows", "width", "stride", "stream"},
           [](uintptr_t y, uintptr_t gate_up, int64_t rows, int width, int64_t stride, Stream stream) {
               silu_mul(pointer<bf16>(y), pointer<bf16>(gate_up), rows, width, stride, stream);
           });
    define(m, "silu_mul_fp8", {"y", "scales", "gate_up", "scale", "rows", "width", "stride", "stream"},
           [](uintptr_t y, uintptr_t scales, uintptr_t gate_up, uintptr_t scale, int64_t rows, int width,
              int64_t stride, Stream stream) {
               silu_mul_fp8(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(gate_up), pointer<float>(scale),
                            rows, width, stride, stream);
           });
    define(m, "quantize_tokens", {"y", "scales", "x", "scale", "rows", "width", "stride", "stream"},
           [](uintptr_t y, uintptr_t scales, uintptr_t x, uintptr_t scale, int64_t rows, int width, int64_t stride,
              Stream stream) {
               quantize_tokens(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(x), pointer<float>(scale), rows,
                               width, stride, stream);
           });
    define(m, "quantize_token_blocks", {"y", "scales", "x", "rows", "width", "stride", "stream"},
           [](uintptr_t y, uintptr_t scales, uintptr_t x, int64_t rows, int width, int64_t stride, Stream stream) {
               quantize_token_blocks(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(x), rows, width, stride,
                                     stream);
           });
}

}  // namespace nemo
