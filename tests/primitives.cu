// Every primitive of csrc/common, those that no kernel uses yet among them, so that each is assembled for sm_90a: a kernel for
// what belongs together, whose instructions tests/test_primitives.py expects. Nothing of this runs.
#include "common/cluster.cuh"
#include "common/mma.cuh"

namespace nemo {

struct Memory {
    float* floats;
    int* ints;
    uint32_t* words;
    uint4* vectors;
    int count;
};

#define KERNEL(NAME) extern "C" __global__ void NAME(const Memory m)

// ---- barriers and dependent launch

KERNEL(barriers) {
    block_sync();
    named_barrier_arrive(1, 64);
    named_barrier_sync(2, 64);
    warp_sync();
}

KERNEL(phase_barriers) {
    auto* barrier = shared_memory<Mbarrier>();
    mbarrier_init(barrier, m.count);
    mbarrier_init_fence();
    mbarrier_arrive(barrier);
    mbarrier_arrive_expect(barrier, m.count);
    mbarrier_wait(barrier, 1);
    m.ints[0] = mbarrier_test(barrier, 0);
    fence_async_proxy();
    fence_async_proxy_global();
}

KERNEL(dependent_launch) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    store(m.ints, 1);
}

extern "C" __global__ void __launch_bounds__(384, 1) registers_of_roles(const Memory m) {
    if (threadIdx.x < 128) {
        give_registers<40>();
        store(m.ints, 1);
    } else {
        take_registers<232>();
        store(m.ints, 2);
    }
}

// ---- memory

KERNEL(ordinary_memory) {
    store(m.vectors, load(m.vectors + 1));
    store(m.floats, load(m.floats + 1));
}

KERNEL(streamed_memory) { store(m.vectors, load_streamed(m.vectors + 1)); }

KERNEL(published_memory) {
    int seen = load_acquire(m.ints);
    fence_global();
    store_release(m.ints + 1, seen);
}

KERNEL(ordered_atomic) { store(m.ints + 1, atomic_add_ordered(m.ints, 1)); }

KERNEL(atomics) {
    store(m.ints + 3, atomic_add(m.ints, 1) + atomic_max(m.ints + 1, 2) + atomic_min(m.ints + 2, 3));
}

KERNEL(copies) {
    auto* shared = shared_memory<unsigned char>();
    copy_async(shared, m.vectors);
    copy_async(shared + 16, m.vectors + 1, m.count > 1);
    copy_async_commit();
    copy_async_wait<1>();
    mbarrier_arrive_after_copies(reinterpret_cast<Mbarrier*>(shared + 32));
}

KERNEL(prefetch) { prefetch_l2(m.floats); }

// ---- the copy engine

extern "C" __global__ void copy_engine(const Memory m, const __grid_constant__ TensorMap map) {
    auto* shared = shared_memory<unsigned char>();
    auto* barrier = reinterpret_cast<Mbarrier*>(shared + 8192);
    tma_prefetch_map(&map);
    tma_load_2d(shared, &map, barrier, 0, m.count);
    tma_load_2d(shared + 1024, &map, barrier, 0, m.count, Keep::EVICT_FIRST);
    tma_load_3d(shared + 2048, &map, barrier, 0, 0, m.count, Keep::EVICT_LAST);
    bulk_load(shared + 4096, m.vectors, 1024, barrier);
    tma_store_2d(&map, shared, 0, m.count);
    tma_store_commit();
    tma_store_wait_read<0>();
    tma_store_wait<0>();
}

// ---- clusters

extern "C" __global__ void __cluster_dims__(2, 1, 1) clusters(const Memory m, const __grid_constant__ TensorMap map) {
    auto* shared = shared_memory<unsigned char>();
    auto* barrier = reinterpret_cast<Mbarrier*>(shared + 8192);
    cluster_arrive_relaxed();
    cluster_wait();
    tma_load_2d_multicast(shared, &map, barrier, 0, m.count, 3);
    mbarrier_arrive_at(barrier, cluster_rank() ^ 1);
    cluster_arrive();
    cluster_wait();
}

// ---- matrices

KERNEL(matrix_moves) {
    auto* shared = shared_memory<unsigned char>();
    uint32_t four[4], other[4], two[2], last[2];
    load_matrix_x4(four, shared);
    load_matrix_x4_transposed(other, shared + 512);
    load_matrix_x2(two, shared + 1024);
    load_matrix_x2_transposed(last, shared + 2048);
    four[0] ^= transpose_matrix(two[0] ^ two[1]);
    other[0] ^= last[0] ^ last[1];
    store_matrix_x4(shared, four);
    store_matrix_x4(shared + 512, other);
}

KERNEL(warp_products) {
    float d[4] = {};
    uint32_t a[4] = {m.words[0], m.words[1], m.words[2], m.words[3]}, b[2] = {m.words[4], m.words[5]};
    mma_16x8x16_bf16(d, a, b);
    mma_16x8x16_fp16(d, a, b);
    for (int i = 0; i < 4; i++) store(m.floats + i, d[i]);
}

// bf16 of both orders of B, with A in shared memory and in registers, and FP8.
template <int N>
__device__ __forceinline__ void group_products(const Memory& m) {
    auto* shared = shared_memory<unsigned char>();
    float d[N / 2];
    uint32_t a[4] = {m.words[0], m.words[1], m.words[2], m.words[3]};
    uint64_t k_major = matrix_k_major(shared), n_major = matrix_n_major(shared + 8192, 8192);
    wgmma_fence();
    Wgmma<N>::template bf16<false>(d, k_major, k_major, 0);
    Wgmma<N>::template bf16<true>(d, k_major, n_major, 1);
    Wgmma<N>::template bf16<false>(d, a, k_major, 1);
    Wgmma<N>::template bf16<true>(d, a, n_major, 1);
    Wgmma<N>::fp8(d, k_major, k_major, 1);
    wgmma_commit();
    wgmma_wait<0>();
    keep_in_registers(d);
    for (int i = 0; i < N / 2; i++) store(m.floats + i * 128 + threadIdx.x, d[i]);
}
#define GROUP_PRODUCTS(N) \
    extern "C" __global__ void __launch_bounds__(128, 1) group_products_##N(const Memory m) { group_products<N>(m); }
GROUP_PRODUCTS(16)
GROUP_PRODUCTS(32)
GROUP_PRODUCTS(40)
GROUP_PRODUCTS(48)
GROUP_PRODUCTS(64)
GROUP_PRODUCTS(80)
GROUP_PRODUCTS(96)
GROUP_PRODUCTS(112)
GROUP_PRODUCTS(128)
GROUP_PRODUCTS(160)
GROUP_PRODUCTS(176)
GROUP_PRODUCTS(192)
GROUP_PRODUCTS(224)
GROUP_PRODUCTS(256)

// The exponentials come before the wait for the product: the store that never happens needs them.
extern "C" __global__ void __launch_bounds__(128, 1) overlapped(const Memory m) {
    auto* shared = shared_memory<unsigned char>();
    float d[8], x = exp2_fast(load(m.floats));
    wgmma_fence();
    Wgmma<16>::fp8(d, matrix_k_major(shared), matrix_k_major(shared), 0);
    wgmma_commit();
    x = exp2_fast(multiply(x, 2.0f));
    compute_before(x, reinterpret_cast<float*>(shared + 8192));
    wgmma_wait<0>();
    keep_in_registers(d);
    for (int i = 0; i < 8; i++) store(m.floats + i * 128 + threadIdx.x, d[i] * x);
}

// ---- lanes

KERNEL(lanes) {
    int x = load(m.ints + lane_index()), y = warp_index();
    x = shuffle(x, 3) + shuffle_xor(x, 1) + shuffle_up(x, 2);
    uint32_t bits = ballot(x > 0);
    y += count_bits(bits) + lowest_bit(bits);
    store(m.ints + lane_index(), x + y + warp_sum(x) + warp_max(y) + warp_min<16>(x));
}

// ---- numbers

KERNEL(conversions) {
    float a = load(m.floats), b = load(m.floats + 1);
    uint32_t halves = pack_fp16(a, b), bytes = pack_fp8(a, b);
    store(m.words, pack_bf16(a, b));
    store(m.words + 1, halves);
    store(m.words + 2, bytes);
    store(m.words + 3, fp8x2_to_fp16x2(uint16_t(load(m.words + 4))));
    store(m.words + 5, permute_bytes(halves, bytes, 0x3120));
    store(m.floats + 2, fp16_to_float(uint16_t(load(m.words + 6))));
    store(m.words + 7, bits_of_float(a) ^ bits_of_float(float_of_bits(load(m.words + 8))));
    store(m.floats + 3, widen(narrow<bf16>(a)) + widen(narrow<fp8>(b)) + rounded<float>(a));
}

KERNEL(arithmetic) {
    float a = load(m.floats), b = load(m.floats + 1);
    store(m.floats + 2, exp2_fast(a));
    store(m.floats + 3, log2_fast(a));
    store(m.floats + 4, reciprocal_fast(a));
    store(m.floats + 5, rsqrt_fast(a));
    store(m.floats + 6, divide(a, b));
    store(m.floats + 7, add(multiply(a, b), b));  // not fused
    store(m.floats + 8, multiply_add(a, b, a));
}

}  // namespace nemo
