// Launches of token selection.
#include "sampling/sample.cuh"

#include "common/launch.h"

namespace nemo {

int sample_subs(int vocab_size) { return ceil_div(vocab_size, SUB); }

void sample(const SampleInputs& in, Stream stream) {
    if (in.rows == 0) return;
    CHECK_RANGE(in.rows, 1, 65535);
    CHECK_RANGE(in.vocab_size, 1, 1 << 22);
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
