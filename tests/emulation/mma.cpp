// The arithmetic of matrix products, and where their operands lie.
//
// bf16 and fp16: products are exact, the sum is fp32. FP8, a model of Hopper's tensor core, which keeps fewer bits than
// fp32 while it adds: the accumulator and the products of one instruction are cut off FP8_FRACTION_BITS below the
// largest exponent among them. A kernel that never adds its sums up in fp32 shows in the error.
#include "common/mma.cuh"

#include <algorithm>
#include <array>


namespace nemo {
namespace emulated {
namespace {

constexpr int FP8_FRACTION_BITS = 13;
constexpr int MAX_COLUMNS = 256;
constexpr int MAX_DEPTH = 32;

struct Tables {
    std::array<float, 65536> bf16, fp16;
    std::array<float, 256> fp8;
    Tables() {
        for (int i = 0; i < 65536; i++) bf16[i] = float_of_bf16(uint16_t(i)), fp16[i] = float_of_fp16(uint16_t(i));
        for (int i = 0; i < 256; i++) fp8[i] = float_of_fp8(uint8_t(i));
    }
};
const Tables& tables() {
    static Tables all;
    return all;
}


// The elements in a register, lowest first; returns how many.
int unpack(Format format, uint32_t bits, float* to) {
    if (format == Format::FP8) {
        for (int i = 0; i < 4; i++) to[i] = tables().fp8[bits >> (8 * i) & 0xFF];
        return 4;
    }
    const auto& table = format == Format::BF16 ? tables().bf16 : tables().fp16;
    to[0] = table[bits & 0xFFFF];
    to[1] = table[bits >> 16];
    return 2;
}

// d[n] += sum over k of a[k] b[k][n], in fp32.
void multiply_row(float* d, const float* a, const float (*b)[MAX_COLUMNS], int columns, int depth) {
    for (int k = 0; k < depth; k++)
        for (int n = 0; n < columns; n++) d[n] += a[k] * b[k][n];
}

void multiply_row_fp8(float* d, const float* a, const float (*b)[MAX_COLUMNS], int columns, int depth) {
    float products[MAX_DEPTH][MAX_COLUMNS];
    uint32_t largest[MAX_COLUMNS];
    for (int n = 0; n < columns; n++) largest[n] = bits_of_float(d[n]) & 0x7FFFFFFF;
    for (int k = 0; k < depth; k++) {
        for (int n = 0; n < columns; n++) {
            products[k][n] = a[k] * b[k][n];
            largest[n] = std::max(largest[n], bits_of_float(products[k][n]) & 0x7FFFFFFF);
        }
    }
    float unit[MAX_COLUMNS], inverse[MAX_COLUMNS];
    int sums[MAX_COLUMNS];
    bool is_finite = true;
    for (int n = 0; n < columns; n++) {
        int exponent = std::clamp(int(largest[n] >> 23) - FP8_FRACTION_BITS, 1, 253);
        is_finite &= largest[n] < 0x7F800000;
        unit[n] = float_of_bits(uint32_t(exponent) << 23);
        inverse[n] = float_of_bits(uint32_t(254 - exponent) << 23);
    }
    if (!is_finite) return multiply_row(d, a, b, columns, depth);
    for (int n = 0; n < columns; n++) sums[n] = int(d[n] * inverse[n]);
    for (int k = 0; k < depth; k++)
        for (int n = 0; n < columns; n++) sums[n] += int(products[k][n] * inverse[n]);
    for (int n = 0; n < columns; n++) d[n] = float(sums[n]) * unit[n];
}

void multiply(Format format, float* d, const float* a, const float (*b)[MAX_COLUMNS], int columns) {
    if (format == Format::FP8) return multiply_row_fp8(d, a, b, columns, 32);
    multiply_row(d, a, b, columns, 16);
}

// A of 16 rows from the four registers of each lane.
void gather_a(Format format, float (*a)[MAX_DEPTH], int lane, const uint32_t* registers) {
    int per_register = format == Format::FP8 ? 4 : 2, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
        unpack(format, registers[i], &a[g + 8 * (i % 2)][per_register * (t + 4 * (i / 2))]);
}

// 16 bytes of an operand, whose matrix starts at `start`, at the byte `offset` that they have without swizzle.
const unsigned char* operand(uint32_t start, uint32_t offset) {
    uint32_t address = start + offset;
    return machine().async_read(address ^ ((address >> 7 & 7) << 4), 16);
}

struct Descriptor {
    uint32_t start, leading, stride;
    explicit Descriptor(uint64_t bits)
        : start(uint32_t(bits & 0x3FFF) << 4), leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
          stride(uint32_t(bits >> 32 & 0x3FFF) << 4) {
        if (bits >> 62 != 1) machine().fail("a matrix descriptor without 128-byte swizzle");
        if (bits >> 49 & 7) machine().fail("a matrix descriptor with a base offset");
    }
};

// `rows` rows of one instruction's depth (32 bytes) of a K-major matrix: to(row, k, value).
template <class To>
void read_k_major(Format format, const Descriptor& matrix, int first_row, int rows, To to) {
    int size = format == Format::FP8 ? 1 : 2;
    for (int row = first_row; row < first_row + rows; row++) {
        for (int half = 0; half < 2; half++) {
            const unsigned char* chunk = operand(matrix.start, row / 8 * matrix.stride + row % 8 * 128 + half * 16);
            float values[16];
            for (int i = 0; i < 16; i += 4) {
                uint32_t word;
                std::memcpy(&word, chunk + i, 4);
                unpack(format, word, values + i / size);
            }
            for (int i = 0; i < 16 / size; i++) to(row - first_row, half * 16 / size + i, values[i]);
        }
    }
}

// 16 of K of an N-major matrix of bf16.
template <class To>
void read_n_major(const Descriptor& matrix, int columns, To to) {
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < columns; n += 8) {
            const unsigned char* chunk =
                operand(matrix.start, k / 8 * matrix.stride + k % 8 * 128 + n / 64 * matrix.leading + n % 64 * 2);
            for (int i = 0; i < 8; i++) {
                uint16_t bits;
                std::memcpy(&bits, chunk + 2 * i, 2);
                to(k, n + i, tables().bf16[bits]);
            }
        }
    }
}

// The 16 rows of one warp.
void perform_product(const GroupProduct& product, int warp, const std::array<GroupFragments, 32>& lanes) {
    static float a[16][MAX_DEPTH], b[MAX_DEPTH][MAX_COLUMNS], row[MAX_COLUMNS];
    if (product.is_a_in_registers) {
        for (int lane = 0; lane < 32; lane++) gather_a(product.format, a, lane, lanes[lane].a);
    } else {
        read_k_major(product.format, Descriptor(product.a), warp % 4 * 16, 16,
                     [](int m, int k, float value) { a[m][k] = value; });
    }
    if (product.is_b_n_major) {
        read_n_major(Descriptor(product.b), product.columns, [](int k, int n, float value) { b[k][n] = value; });
    } else {
        read_k_major(product.format, Descriptor(product.b), 0, product.columns,
                     [](int n, int k, float value) { b[k][n] = value; });
    }
    for (int m = 0; m < 16; m++) {
        auto element = [&](int n) -> float& {
            return lanes[m % 8 * 4 + n % 8 / 2].d[n / 8 * 4 + m / 8 * 2 + n % 2];
        };
        for (int n = 0; n < product.columns; n++) row[n] = product.keep ? element(n) : 0.0f;
        multiply(product.format, row, a[m], b, product.columns);
        for (int n = 0; n < product.columns; n++) element(n) = row[n];
    }
}

unsigned char* matrix_row(const void* row) {
    auto& m = machine();
    m.address_of_shared(row, 16, "a row of a matrix");
    if (reinterpret_cast<uintptr_t>(row) % 16) m.fail("a row of a matrix that is not 16-byte aligned");
    return static_cast<unsigned char*>(const_cast<void*>(row));
}

}  // namespace

void load_matrices(const char* primitive, MatrixRow mine, int matrices, bool is_transposed) {
    together(primitive, mine, [=](MatrixRow** lanes) {
        for (int matrix = 0; matrix < matrices; matrix++) {
            uint16_t elements[8][8];
            for (int i = 0; i < 8; i++) std::memcpy(elements[i], matrix_row(lanes[8 * matrix + i]->row), 16);
            for (int lane = 0; lane < 32; lane++) {
                int g = lane / 4, t = lane % 4;
                uint32_t low = is_transposed ? elements[2 * t][g] : elements[g][2 * t];
                uint32_t high = is_transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
                lanes[lane]->registers[matrix] = low | high << 16;
            }
        }
    });
}

void store_matrices(const char* primitive, MatrixRow mine, int matrices) {
    together(primitive, mine, [=](MatrixRow** lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < matrices; matrix++)
                std::memcpy(matrix_row(lanes[8 * matrix + lane / 4]->row) + lane % 4 * 4, &lanes[lane]->registers[matrix], 4);
    });
}

void warp_product(const char* primitive, Format format, Fragments mine) {
    together(primitive, mine, [=](Fragments** lanes) {
        static float a[16][MAX_DEPTH], b[MAX_DEPTH][MAX_COLUMNS], d[16][8];
        int per_register = format == Format::FP8 ? 4 : 2;
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            gather_a(format, a, lane, lanes[lane]->a);
            for (int half = 0; half < 2; half++) {
                float values[4];
                int count = unpack(format, lanes[lane]->b[half], values);
                for (int i = 0; i < count; i++) b[per_register * (t + 4 * half) + i][g] = values[i];
            }
            for (int i = 0; i < 4; i++) d[g + i / 2 * 8][2 * t + i % 2] = lanes[lane]->d[i];
        }
        for (int m = 0; m < 16; m++) multiply(format, d[m], a[m], b, 8);
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    });
}

void group_product(const GroupProduct& product, GroupFragments& mine) {
    together(product.primitive, mine, [&product](GroupFragments** slots) {
        Machine& m = machine();
        Warp& warp = m.warp();
        int number = m.current->thread / 32;
        if (!warp.has_fenced) m.fail(text(product.primitive, " without wgmma_fence"));
        auto& all = m.products[number / 4];
        Product brought{product.primitive, product.a, product.b, product.keep};
        if (warp.num_products == all.size()) all.push_back(brought);
        if (all[warp.num_products++] != brought) m.fail(text(product.primitive, ": the warps of a warpgroup bring different operands"));
        std::array<GroupFragments, 32> lanes;
        for (int i = 0; i < 32; i++) lanes[i] = *slots[i];
        auto work = std::make_shared<Pending>();
        work->perform = [product, number, lanes] { perform_product(product, number, lanes); };
        if (warp.last_product && !warp.last_product->is_done) work->before = warp.last_product;
        warp.last_product = work;
        warp.open_products.push_back(work);
        m.submit(work);
    });
}

}  // namespace emulated

uint32_t transpose_matrix(uint32_t r) {
    struct Slot {
        uint32_t mine, result;
    } slot{r, 0};
    emulated::together("transpose_matrix", slot, [](Slot** lanes) {
        auto element = [&](int row, int column) {
            return lanes[row * 4 + column / 2]->mine >> (16 * (column % 2)) & 0xFFFF;
        };
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            lanes[lane]->result = element(2 * t, g) | element(2 * t + 1, g) << 16;
        }
    });
    return slot.result;
}

void wgmma_fence() {
    emulated::machine().meet("wgmma_fence", nullptr, [](void**) { emulated::machine().warp().has_fenced = true; });
}
void wgmma_commit() {
    emulated::machine().meet("wgmma_commit", nullptr, [](void**) {
        auto& warp = emulated::machine().warp();
        warp.product_groups.push_back(std::move(warp.open_products));
        warp.open_products.clear();
    });
}

}  // namespace nemo
