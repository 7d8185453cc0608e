// Linear layers of few tokens with FP8 weights.
#include "linear/small_launch.cuh"

namespace nemo {

void small_linear_fp8(bf16* y, const LinearInputs& in, const fp8* weight, int outputs, int64_t weight_stride,
                      const LinearScales& scales, Stream stream) {
    check_small_linear(y, in, weight, outputs, weight_stride);
    const float *w_scales = scales.w, *x_scales = scales.x;
    int64_t w_scale_stride = scales.w_stride, x_scale_stride = scales.x_stride;
    CHECK_ALIGNED(w_scales, 4);
    CHECK_STRIDE(w_scale_stride, 1);
    if (in.input == Input::READY) {
        CHECK_ALIGNED(x_scales, 4);
        CHECK_STRIDE(x_scale_stride, 1);
    } else {
        CHECK(!scales.is_block, "is_block must be false for an input that is made here: it has one scale per token");
    }
    auto run = [&](auto tokens, auto is_block, auto input) {
        launch_small_linear<fp8, tokens(), is_block(), input()>(y, in, weight, outputs, weight_stride, scales, stream);
    };
    using Sixteen = std::integral_constant<int, 16>;
    if (is_streamed(in)) {
        return with_tokens(in.rows, [&](auto tokens) {
            std::integral_constant<Input, Input::READY> ready;
            scales.is_block ? run(tokens, std::true_type{}, ready) : run(tokens, std::false_type{}, ready);
        });
    }
    switch (in.input) {
        case Input::NORM: return run(Sixteen{}, std::false_type{}, std::integral_constant<Input, Input::NORM>{});
        case Input::SILU_MUL:
            return run(Sixteen{}, std::false_type{}, std::integral_constant<Input, Input::SILU_MUL>{});
        default: return run(Sixteen{}, std::false_type{}, std::integral_constant<Input, Input::QUANTIZE>{});
    }
}

}  // namespace nemo
