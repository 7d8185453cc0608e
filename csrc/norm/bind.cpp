// Python's view of csrc/norm.
#include "common/bind.h"
#include "norm/norm.h"

namespace nemo {

namespace {

RmsNormInputs inputs(uintptr_t sum, uintptr_t x, uintptr_t residual, uintptr_t weight, int64_t rows, int width,
                     int64_t x_stride, int64_t residual_stride, float eps) {
    return {pointer<bf16>(sum),
            pointer<bf16>(x),
            pointer<bf16>(residual),
            pointer<bf16>(weight),
            rows,
            width,
            x_stride,
            residual_stride,
            eps};
}

}  // namespace

void register_norm(pybind11::module_& m) {
    define(m, "rms_norm",
           {"y", "sum", "x", "residual", "weight", "rows", "width", "x_stride", "residual_stride", "eps", "stream"},
           [](uintptr_t y, uintptr_t sum, uintptr_t x, uintptr_t residual, uintptr_t weight, int64_t rows, int width,
              int64_t x_stride, int64_t residual_stride, float eps, Stream stream) {
               rms_norm(pointer<bf16>(y), inputs(sum, x, residual, weight, rows, width, x_stride, residual_stride, eps),
                        stream);
           });
    define(m, "rms_norm_fp8",
           {"y", "scales", "sum", "x", "residual", "weight", "scale", "rows", "width", "x_stride", "residual_stride",
            "eps", "stream"},
           [](uintptr_t y, uintptr_t scales, uintptr_t sum, uintptr_t x, uintptr_t residual, uintptr_t weight,
              uintptr_t scale, int64_t rows, int width, int64_t x_stride, int64_t residual_stride, float eps,
              Stream stream) {
               rms_norm_fp8(pointer<fp8>(y), pointer<float>(scales),
                            inputs(sum, x, residual, weight, rows, width, x_stride, residual_stride, eps),
                            pointer<float>(scale), stream);
           });
}

}  // namespace nemo
