// Launch of SiLU of the gate times the up projection, in bf16.
#include "activation/silu_mul.cuh"

#include "activation/activation.h"
#include "common/launch.h"

namespace nemo {

// Vectors of a thread. Two keep enough bytes under way and halve the number of blocks: a row of 14336 is then 7 full
// blocks. But one where two would leave multiprocessors without a block, so that few tokens use the whole GPU.
static int silu_mul_vectors(int64_t rows, int width, int num_sms) {
    return rows * ceil_div(width, VECTOR * SILU_MUL_THREADS * 2) < 2 * int64_t(num_sms) ? 1 : 2;
}

void silu_mul(bf16* y, const bf16* gate_up, int64_t rows, int width, int64_t stride, Stream stream) {
    if (rows == 0) return;
    CHECK_RANGE(width, VECTOR, 1 << 24);
    CHECK_MULTIPLE(width, VECTOR);
    CHECK_STRIDE(stride, VECTOR);
    CHECK_POINTER(y);
    CHECK_POINTER(gate_up);
    int vectors = silu_mul_vectors(rows, width, num_sms());
    int pieces = ceil_div(width, VECTOR * SILU_MUL_THREADS * vectors);
    CHECK_RANGE(rows, 0, 0x7FFFFFFF / pieces);
    Launch how{.name = "silu_mul",
               .grid = dim3(unsigned(rows * pieces)),
               .threads = SILU_MUL_THREADS,
               .stream = stream};
    launch(how, vectors == 1 ? silu_mul_kernel<1> : silu_mul_kernel<2>, y, gate_up, width, pieces, stride);
}

}  // namespace nemo
