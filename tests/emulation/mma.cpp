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

struct Descriptor {
    uint32_t start, leading, stride;
    explicit Descriptor(uint64_t bits)
        : start(uint32_t(bits & 0x3FFF) << 4), leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
          stride(uint32_t(bits >> 32 & 0x3FFF) << 4) {
        if (bits >> 62 != 1) machine().fail("a matrix descriptor without 128-byte swizzle");
        if (bits >> 49 & 7) machine().fail("a matrix descriptor with a base offset");
    }
    // The address of 16 bytes that lie at the byte `offset` without swizzle.
    uint32_t at(uint32_t offset) const {
        uint32_t address = start + offset;
        return address ^ ((address >> 7 & 7) << 4);
    }
};

// The 16-byte chunks of `rows` rows of one instruction's depth (32 bytes) of a K-major matrix: visit(address, row, byte).
template <class Visit>
void over_k_major(const Descriptor& matrix, int first_row, int rows, Visit visit) {
    for (int row = first_row; row < first_row + rows; row++)
        for (int byte = 0; byte < 32; byte += 16)
            visit(matrix.at(row / 8 * matrix.stride + row % 8 * 128 + byte), row - first_row, byte);
}
// Of 16 of K of an N-major matrix of bf16, eight columns each: visit(address, k, column).
template <class Visit>
void over_n_major(const Descriptor& matrix, int columns, Visit visit) {
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < columns; n += 8)
            visit(matrix.at(k / 8 * matrix.stride + k % 8 * 128 + n / 64 * matrix.leading + n % 64 * 2), k, n);
}

// The elements of a chunk; NaN if it may be on its way.
int read_chunk(Format format, uint32_t address, bool is_certain, float* to) {
    const unsigned char* chunk = machine().async_place(address, 16);
    int count = format == Format::FP8 ? 16 : 8;
    for (int i = 0; i < 16; i += 4) {
        uint32_t word = 0xFFFFFFFF;
        if (is_certain) std::memcpy(&word, chunk + i, 4);
        unpack(format, word, to + i * count / 16);
    }
    return count;
}

// Every chunk of this warp's operands in shared memory, in one order.
template <class OfA, class OfB>
void over_operands(const GroupProduct& product, int warp, OfA of_a, OfB of_b) {
    if (!product.is_a_in_registers) over_k_major(Descriptor(product.a), warp % 4 * 16, 16, of_a);
    if (product.is_b_n_major) {
        over_n_major(Descriptor(product.b), product.columns, of_b);
    } else {
        over_k_major(Descriptor(product.b), 0, product.columns, of_b);
    }
}

// The operands are read from here on, until the group is waited for.
std::vector<bool> claim_operands(const GroupProduct& product, int warp, int reader, uint32_t group) {
    Machine& m = machine();
    std::vector<bool> is_certain;
    auto claim = [&](uint64_t matrix, bool may_overread) {
        uint32_t start = Descriptor(matrix).at(0);
        return [&, start, may_overread](uint32_t address, int, int) {
            m.async_place(address, 16);
            is_certain.push_back(m.block->races.read_operand(warp * 32, start - SHARED_BASE, address - SHARED_BASE, may_overread, reader, group));
        };
    };
    auto claim_a = claim(product.is_a_in_registers ? product.b : product.a, true);
    over_operands(product, warp, claim_a, claim(product.b, !product.is_b_n_major));
    auto own = is_certain;
    // One operation of all four warps reads A: no warp may change its rows before all have waited.
    if (!product.is_a_in_registers) over_k_major(Descriptor(product.a), 0, 64, claim_a);
    return own;
}

// The 16 rows of one warp.
void perform_product(const GroupProduct& product, int warp, const Issued& issued, const std::vector<bool>& is_certain) {
    static float a[16][MAX_DEPTH], b[MAX_DEPTH][MAX_COLUMNS], row[MAX_COLUMNS];
    size_t chunk = 0;
    int size = product.format == Format::FP8 ? 1 : 2;
    if (product.is_a_in_registers)
        for (int lane = 0; lane < 32; lane++) gather_a(product.format, a, lane, issued.a_before[lane]);
    over_operands(
        product, warp, [&](uint32_t address, int m, int byte) { read_chunk(product.format, address, is_certain[chunk++], &a[m][byte / size]); },
        [&](uint32_t address, int first, int second) {
            float values[16];
            int count = read_chunk(product.format, address, is_certain[chunk++], values);
            for (int i = 0; i < count; i++) {
                if (product.is_b_n_major) {
                    b[first][second + i] = values[i];
                } else {
                    b[second / size + i][first] = values[i];
                }
            }
        });
    Accumulator& sum = *issued.sum;
    for (int m = 0; m < 16; m++) {
        auto element = [&](int n) -> float& {
            return sum.values[(m % 8 * 4 + n % 8 / 2) * sum.count + n / 8 * 4 + m / 8 * 2 + n % 2];
        };
        for (int n = 0; n < product.columns; n++) row[n] = product.keep ? element(n) : 0.0f;
        multiply(product.format, row, a[m], b, product.columns);
        for (int n = 0; n < product.columns; n++) element(n) = row[n];
    }
}

constexpr uint32_t POISON = 0xFFBFFFFF;  // a signaling NaN: no arithmetic gives it, so that what is computed from it differs

// The accumulator of these registers, which hold poison from here on.
std::shared_ptr<Accumulator> take_accumulator(GroupFragments** lanes, int count) {
    Machine& m = machine();
    auto& sum = m.warp().sums[lanes[0]->d];
    if (!sum) {
        sum = std::make_shared<Accumulator>();
        sum->count = count;
        for (int lane = 0; lane < 32; lane++) {
            sum->lanes[lane] = lanes[lane]->d;
            sum->values.insert(sum->values.end(), lanes[lane]->d, lanes[lane]->d + count);
            for (int i = 0; i < count; i++) lanes[lane]->d[i] = float_of_bits(POISON);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        if (sum->lanes[lane] != lanes[lane]->d || sum->count != count) m.fail("wgmma: accumulators in flight overlap");
    sum->in_flight++;
    return sum;
}

// After the wait: what was in flight must be as it was, and the sums come to the registers.
void give_back(const Issued& issued) {
    Machine& m = machine();
    for (int lane = 0; lane < 32; lane++)
        if (issued.a[lane] && std::memcmp(issued.a[lane], issued.a_before[lane], 16))
            m.fail(text("wgmma: registers of A have changed before the wait, in lane ", lane));
    Accumulator& sum = *issued.sum;
    if (--sum.in_flight) return;
    for (int lane = 0; lane < 32; lane++) {
        float* d = sum.lanes[lane];
        for (int i = 0; i < sum.count; i++)
            if (bits_of_float(d[i]) != POISON) m.fail(text("wgmma: an accumulator was written before the wait, in lane ", lane));
        std::copy_n(sum.values.begin() + lane * sum.count, sum.count, d);
    }
    m.warp().sums.erase(sum.lanes[0]);
}

unsigned char* matrix_row(const void* row) {
    auto& m = machine();
    m.address_of_shared(row, 16, "a row of a matrix");
    if (reinterpret_cast<uintptr_t>(row) % 16) m.fail("a row of a matrix that is not 16-byte aligned");
    return static_cast<unsigned char*>(const_cast<void*>(row));
}

// The lanes of this warp give the addresses of so many matrices.
void count_rows(const char* primitive, MatrixRow** lanes, int matrices) {
    Machine& m = machine();
    for (int lane = 0; lane < 8 * matrices; lane++)
        m.counter.access_shared(m.block->number, m.current->thread / 32 * 32 + lane, primitive, m.offset_of(lanes[lane]->row), 16);
}

// Bytes of a row that a lane of this warp moves.
void touch(const void* row, int byte, int bytes, int lane, bool is_write) {
    Machine& m = machine();
    m.block->races.access(m.current->thread / 32 * 32 + lane, m.offset_of(row) + byte, bytes, is_write);
}

}  // namespace

void load_matrices(const char* primitive, MatrixRow mine, int matrices, bool is_transposed) {
    together(primitive, mine, [=](MatrixRow** lanes) {
        count_rows(primitive, lanes, matrices);
        for (int matrix = 0; matrix < matrices; matrix++) {
            uint16_t elements[8][8];
            for (int i = 0; i < 8; i++) std::memcpy(elements[i], matrix_row(lanes[8 * matrix + i]->row), 16);
            for (int lane = 0; lane < 32; lane++) {
                int g = lane / 4, t = lane % 4;
                if (is_transposed) {
                    for (int i = 2 * t; i < 2 * t + 2; i++) touch(lanes[8 * matrix + i]->row, 2 * g, 2, lane, false);
                } else {
                    touch(lanes[8 * matrix + g]->row, 4 * t, 4, lane, false);
                }
                uint32_t low = is_transposed ? elements[2 * t][g] : elements[g][2 * t];
                uint32_t high = is_transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
                lanes[lane]->registers[matrix] = low | high << 16;
            }
        }
    });
}

void store_matrices(const char* primitive, MatrixRow mine, int matrices) {
    together(primitive, mine, [=](MatrixRow** lanes) {
        count_rows(primitive, lanes, matrices);
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < matrices; matrix++) {
                unsigned char* row = matrix_row(lanes[8 * matrix + lane / 4]->row);
                touch(row, lane % 4 * 4, 4, lane, true);
                std::memcpy(row + lane % 4 * 4, &lanes[lane]->registers[matrix], 4);
            }
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
        auto& all = m.block->products[number / 4];
        Product brought{product.primitive, product.a, product.b, product.keep};
        if (warp.num_products == all.size()) all.push_back(brought);
        if (all[warp.num_products++] != brought) m.fail(text(product.primitive, ": the warps of a warpgroup bring different operands"));
        if (warp.reader < 0) warp.reader = m.block->races.new_reader();
        Issued issued{std::make_shared<Pending>(), take_accumulator(slots, product.columns / 2), {}, {}};
        for (int i = 0; i < 32; i++) {
            issued.a[i] = slots[i]->a;
            if (issued.a[i]) std::memcpy(issued.a_before[i], issued.a[i], 16);
        }
        auto is_certain = claim_operands(product, number, warp.reader, warp.groups_committed + 1);
        Issued copy = issued;
        copy.work = nullptr;  // which would hold itself
        issued.work->perform = [product, number, copy, is_certain] { perform_product(product, number, copy, is_certain); };
        if (warp.last_product && !warp.last_product->is_done) issued.work->before = warp.last_product;
        warp.last_product = issued.work;
        m.submit(issued.work);
        warp.open_products.push_back(std::move(issued));
    });
}

void wait_for_products(int most) {
    Machine& m = machine();
    Warp& warp = m.warp();
    while (int(warp.product_groups.size()) > most) {
        for (auto& issued : warp.product_groups.front()) m.perform(issued.work);
        for (auto& issued : warp.product_groups.front()) give_back(issued);
        warp.product_groups.pop_front();
        warp.groups_done++;
    }
    warp.has_fenced = false;
    if (warp.reader < 0) return;
    for (int lane = 0; lane < 32; lane++) m.block->races.learn(m.current->thread / 32 * 32 + lane, warp.reader, warp.groups_done);
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
        warp.groups_committed++;
        warp.open_products.clear();
    });
}

}  // namespace nemo
