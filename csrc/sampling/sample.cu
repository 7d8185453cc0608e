// Launches of token selection.
#include "sampling/sample.cuh"

#include "common/launch.h"

namespace nemo {

namespace {

constexpr int MOST_TOKENS = 1 << 22;

void check(const SampleInputs& in) {
    CHECK_RANGE(in.rows, 1, 65535);
    CHECK_RANGE(in.vocab_size, 1, MOST_TOKENS);
    CHECK_STRIDE(in.stride, 1);
    CHECK_ALIGNED(in.tokens, 8);
    CHECK_ALIGNED(in.logits, in.is_bf16 ? 2 : 4);
    CHECK_ALIGNED(in.slot_ids, 8);
    CHECK_ALIGNED(in.positions, 8);
    CHECK_ALIGNED(in.temperature, 8);
    CHECK_ALIGNED(in.min_p, 8);
    CHECK_ALIGNED(in.top_k, 8);
    CHECK_ALIGNED(in.top_p, 8);
    CHECK_ALIGNED(in.seed_keys, 8);
    CHECK_ALIGNED(in.frequency, 8);
    CHECK_ALIGNED(in.presence, 8);
    CHECK_ALIGNED(in.repetition, 8);
    CHECK_ALIGNED(in.output_counts, 4);
    CHECK_ALIGNED(in.prompt_mask, 1);
    CHECK_ALIGNED(in.best, 4);
    CHECK_ALIGNED(in.note, 4);
    CHECK_ALIGNED(in.counters, 4);
}

}  // namespace

int sample_subs(int vocab_size) {
    CHECK_RANGE(vocab_size, 1, MOST_TOKENS);
    return ceil_div(vocab_size, SUB);
}

void sample(const SampleInputs& in, Stream stream) {
    if (in.rows == 0) return;
    check(in);
    int num_subs = sample_subs(in.vocab_size);
    Launch how{.name = "sample",
               .grid = dim3(unsigned(ceil_div(num_subs, PIECE_SUBS)), unsigned(in.rows)),
               .threads = SAMPLE_THREADS,
               .shared_bytes = int(sizeof(SampleShared)),
               .stream = stream};
    if (in.is_bf16) {
        launch(how, sample_kernel<bf16>, in, num_subs);
    } else {
        launch(how, sample_kernel<float>, in, num_subs);
    }
}

}  // namespace nemo
