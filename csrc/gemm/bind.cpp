// Python's view of csrc/gemm.
#include "common/bind.h"
#include "gemm/gemm.h"

namespace nemo {

void register_gemm(pybind11::module_& m) {
    define(
        m, "gemm_fp8",
        {"y", "x", "x_stride", "x_scales", "x_scale_stride", "w", "w_stride", "w_scales", "w_scale_stride", "residual",
         "residual_stride", "is_block", "is_gated", "rows", "outputs", "width", "stream"},
        [](uintptr_t y, uintptr_t x, int64_t x_stride, uintptr_t x_scales, int64_t x_scale_stride, uintptr_t w,
           int64_t w_stride, uintptr_t w_scales, int64_t w_scale_stride, uintptr_t residual, int64_t residual_stride,
           bool is_block, bool is_gated, int rows, int outputs, int width, Stream stream) {
            gemm_fp8({.y = pointer<bf16>(y),
                      .x = pointer<fp8>(x),
                      .w = pointer<fp8>(w),
                      .residual = pointer<bf16>(residual),
                      .x_scales = pointer<float>(x_scales),
                      .w_scales = pointer<float>(w_scales),
                      .x_stride = x_stride,
                      .w_stride = w_stride,
                      .residual_stride = residual_stride,
                      .x_scale_stride = x_scale_stride,
                      .w_scale_stride = w_scale_stride,
                      .rows = rows,
                      .outputs = outputs,
                      .width = width,
                      .is_block = is_block,
                      .is_gated = is_gated},
                     stream);
        });
}

}  // namespace nemo
