// Python's view of csrc/linear.
#include "common/bind.h"
#include "common/check.h"
#include "linear/linear.h"

namespace nemo {

namespace {

LinearInputs inputs(int input, uintptr_t x, uintptr_t residual, uintptr_t norm, uintptr_t sum, uintptr_t fixed_scale,
                    float eps, int rows, int width, int64_t x_stride, int64_t residual_stride, uintptr_t made,
                    uintptr_t made_scales, uintptr_t counts) {
    return {static_cast<Input>(input),
            pointer<void>(x),
            pointer<bf16>(residual),
            pointer<bf16>(norm),
            pointer<bf16>(sum),
            pointer<float>(fixed_scale),
            eps,
            rows,
            width,
            x_stride,
            residual_stride,
            pointer<void>(made),
            pointer<float>(made_scales),
            pointer<int>(counts)};
}

}  // namespace

void register_linear(pybind11::module_& m) {
    define(m, "small_linear_fits", {"input", "is_fp8", "rows", "outputs", "width"},
           [](int input, bool is_fp8, int rows, int outputs, int width) {
               CHECK_RANGE(input, int(Input::READY), int(Input::QUANTIZE));
               return small_linear_fits(static_cast<Input>(input), is_fp8, rows, outputs, width);
           });
    define(m, "small_linear",
           {"y", "input", "x", "residual", "norm", "sum", "fixed_scale", "eps", "rows", "width", "x_stride",
            "residual_stride", "made", "made_scales", "counts", "weight", "outputs", "weight_stride", "stream"},
           [](uintptr_t y, int input, uintptr_t x, uintptr_t residual, uintptr_t norm, uintptr_t sum,
              uintptr_t fixed_scale, float eps, int rows, int width, int64_t x_stride, int64_t residual_stride,
              uintptr_t made, uintptr_t made_scales, uintptr_t counts, uintptr_t weight, int outputs,
              int64_t weight_stride, Stream stream) {
               small_linear(
                   pointer<bf16>(y),
                   inputs(input, x, residual, norm, sum, fixed_scale, eps, rows, width, x_stride, residual_stride, made,
                          made_scales, counts),
                   pointer<bf16>(weight), outputs, weight_stride, stream);
           });
    define(m, "small_linear_fp8", {"y", "input", "x", "residual", "norm",
                                   "sum", "fixed_scale", "eps", "rows", "width",
                                   "x_stride", "residual_stride", "made", "made_scales", "counts",
                                   "weight", "outputs", "weight_stride",
                                   "x_scales", "x_scale_stride", "w_scales", "w_scale_stride", "is_block",
                                   "stream"},
           [](uintptr_t y, int input, uintptr_t x, uintptr_t residual, uintptr_t norm, uintptr_t sum,
              uintptr_t fixed_scale, float eps, int rows, int width, int64_t x_stride, int64_t residual_stride,
              uintptr_t made, uintptr_t made_scales, uintptr_t counts, uintptr_t weight, int outputs,
              int64_t weight_stride, uintptr_t x_scales, int64_t x_scale_stride,
              uintptr_t w_scales, int64_t w_scale_stride, bool is_block, Stream stream) {
               small_linear_fp8(
                   pointer<bf16>(y),
                   inputs(input, x, residual, norm, sum, fixed_scale, eps, rows, width, x_stride, residual_stride, made,
                          made_scales, counts),
                   pointer<fp8>(weight), outputs, weight_stride,
                   {pointer<float>(x_scales), x_scale_stride, pointer<float>(w_scales), w_scale_stride, is_block},
                   stream);
           });
}

}  // namespace nemo
