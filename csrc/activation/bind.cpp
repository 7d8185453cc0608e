// Python's view of csrc/activation.
#include "activation/activation.h"
#include "common/bind.h"

namespace nemo {

void register_activation(pybind11::module_& m) {
    m.def("silu_mul", [](uintptr_t y, uintptr_t gate_up, int64_t rows, int width, int64_t stride, Stream stream) {
        silu_mul(pointer<bf16>(y), pointer<bf16>(gate_up), rows, width, stride, stream);
    });
    m.def("silu_mul_fp8", [](uintptr_t y, uintptr_t scales, uintptr_t gate_up, uintptr_t scale, int64_t rows, int width,
                             int64_t stride, Stream stream) {
        silu_mul_fp8(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(gate_up), pointer<float>(scale), rows,
                     width, stride, stream);
    });
    m.def("quantize_tokens", [](uintptr_t y, uintptr_t scales, uintptr_t x, uintptr_t scale, int64_t rows, int width,
                                int64_t stride, Stream stream) {
        quantize_tokens(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(x), pointer<float>(scale), rows, width,
                        stride, stream);
    });
    m.def("quantize_token_blocks", [](uintptr_t y, uintptr_t scales, uintptr_t x, int64_t rows, int width,
                                      int64_t stride, Stream stream) {
        quantize_token_blocks(pointer<fp8>(y), pointer<float>(scales), pointer<bf16>(x), rows, width, stride, stream);
    });
}

}  // namespace nemo
