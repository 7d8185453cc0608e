// Linear layers of few tokens with bf16 weights.
#include "linear/small_launch.cuh"

namespace nemo {

bool small_linear_fits(Input input, bool is_fp8, int rows, int outputs, int width) {
    bool is_streamed = input == Input::READY;
    if (rows < 1 || rows > (is_streamed ? 64 : FUSED_TOKENS)) return false;
    CHECK_RANGE(outputs, 1, 1 << 30);
    CHECK_RANGE(width, 1, 1 << 24);
    int chunks = ceil_div(width, CHUNK_BYTES / (is_fp8 ? 1 : 2));
    bool has_parts = input == Input::SILU_MUL && !is_fp8;
    return plan_small_linear(rows, outputs, chunks, is_streamed, has_parts).shared_bytes <= MAX_SHARED_BYTES;
}

void small_linear(bf16* y, const LinearInputs& in, const bf16* weight, int outputs, int64_t weight_stride,
                  Stream stream) {
    check_small_linear(y, in, weight, outputs, weight_stride);
    auto run = [&](auto tokens, auto input) {
        launch_small_linear<bf16, tokens(), false, input()>(y, in, weight, outputs, weight_stride, {}, stream);
    };
    CHECK(in.input != Input::QUANTIZE, "input must be 0 to 2 for bf16 weights, which take no FP8, got ", int(in.input));
    using Sixteen = std::integral_constant<int, 16>;
    if (is_streamed(in)) {
        return with_tokens(in.rows, [&](auto tokens) { run(tokens, std::integral_constant<Input, Input::READY>{}); });
    }
    switch (in.input) {
        case Input::NORM: return run(Sixteen{}, std::integral_constant<Input, Input::NORM>{});
        default: return run(Sixteen{}, std::integral_constant<Input, Input::SILU_MUL>{});
    }
}

}  // namespace nemo
