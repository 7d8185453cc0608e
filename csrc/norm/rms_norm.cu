// Launches of RMSNorm.
#include "norm/rms_norm.cuh"

#include "common/launch.h"
#include "norm/norm.h"

namespace nemo {

namespace {

template <class Y>
void launch_rms_norm(const char* name, const RmsNorm<Y>& p, int64_t rows, Stream stream) {
    RowPlan plan = plan_row(rows, p.width, num_sms());
    Launch how{.name = name,
               .grid = dim3(unsigned(rows)),
               .threads = plan.threads,
               .shared_bytes = RMS_NORM_SHARED_BYTES,
               .stream = stream};
    with_vectors(plan, [&](auto vectors) {
        if (p.residual != nullptr) {
            launch(how, rms_norm_kernel<vectors(), true, Y>, p);
        } else {
            launch(how, rms_norm_kernel<vectors(), false, Y>, p);
        }
    });
}

template <class Y>
RmsNorm<Y> checked(Y* y, float* scales, const RmsNormInputs& in, const float* scale) {
    check_rows(in.rows, in.width);
    CHECK_POINTER(y);
    CHECK_POINTER(in.x);
    CHECK_POINTER(in.weight);
    CHECK_STRIDE(in.x_stride, VECTOR);
    CHECK(in.eps >= 0, "eps must not be negative, got ", in.eps);
    CHECK_OPTIONAL(scale, 4);
    if (in.residual != nullptr) {
        CHECK_POINTER(in.residual);
        CHECK_POINTER(in.sum);
        CHECK_STRIDE(in.residual_stride, VECTOR);
    }
    return {.y = y,
            .scales = scales,
            .sum = in.sum,
            .x = in.x,
            .residual = in.residual,
            .weight = in.weight,
            .fixed_scale = scale,
            .width = in.width,
            .x_stride = in.x_stride,
            .residual_stride = in.residual_stride,
            .eps = in.eps};
}

}  // namespace

void rms_norm(bf16* y, const RmsNormInputs& in, Stream stream) {
    if (in.rows == 0) return;
    launch_rms_norm("rms_norm", checked(y, nullptr, in, nullptr), in.rows, stream);
}

void rms_norm_fp8(fp8* y, float* scales, const RmsNormInputs& in, const float* scale, Stream stream) {
    if (in.rows == 0) return;
    CHECK_ALIGNED(scales, 4);
    launch_rms_norm("rms_norm_fp8", checked(y, scales, in, scale), in.rows, stream);
}

}  // namespace nemo
