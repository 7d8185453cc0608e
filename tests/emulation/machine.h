// The machine: runs the threads of up to MOST_BLOCKS blocks at once as fibers, in an order drawn from a seed.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/check.h"
#include "emulation/counts.h"
#include "emulation/cuda.h"
#include "emulation/global.h"

namespace nemo::emulated {

constexpr uint32_t SHARED_BASE = 1024;  // the shared address of the first byte: not 0, and aligned for every swizzle
constexpr int SHARED_LIMIT = 227 * 1024;
constexpr int GUARD = 4096;  // poisoned bytes after the block's shared memory
constexpr int MOST_BLOCKS = 3;
constexpr int REGISTERS = 65536;  // of a multiprocessor
constexpr int MOST_BYTES_OF_A_PHASE = (1 << 20) - 1;

// Accesses of the running thread to the tracked bytes are told to the machine (access.cpp).
extern uintptr_t tracked_begin, tracked_bytes;

struct Fiber;
struct Block;

// Fibers that wait for the same thing.
struct Queue {
    std::vector<Fiber*> fibers;
};

// Work of the copy engine, of asynchronous copies or of the tensor cores, which happens some time after it was asked for.
struct Pending {
    std::function<void()> perform;
    bool is_done = false;
    std::shared_ptr<Pending> before;  // must happen first, if it is not null
    size_t place = 0;                 // among those that are pending
    int copied = -1;                  // of cp.async: the offset in shared memory
};
using Work = std::shared_ptr<Pending>;

struct Fiber {
    Block* block = nullptr;
    void* stack_pointer = nullptr;
    std::unique_ptr<unsigned char[]> stack;
    uint3 index{};
    int thread = 0;
    bool is_ended = true;
    bool has_waited = false;  // for the previous kernel
    const char* waits_at = nullptr;
    bool is_in_cluster_barrier = false;  // between its halves
    uint32_t cluster_phase = 0;
    std::vector<Work> open_copies;               // cp.async, not yet in a group
    std::deque<std::vector<Work>> copy_groups;   // cp.async
    std::vector<Work> open_stores;               // TMA stores
    std::deque<std::vector<Work>> store_groups;
    int reader = -1;  // the slot of its TMA stores
    uint32_t stores_committed = 0, stores_read = 0;
};

// What a warp's products add to: taken from the lanes' registers when the first is issued, which hold poison until the
// last has been waited for.
struct Accumulator {
    float* lanes[32];
    int count;  // of a lane
    std::vector<float> values;
    int in_flight = 0;
};

// A product that a warp has issued.
struct Issued {
    Work work;
    std::shared_ptr<Accumulator> sum;
    const uint32_t* a[32];  // registers of A, null if it lies in shared memory
    uint32_t a_before[32][4];
};

// 32 lanes that meet at one primitive. `slots` point to what each lane brings, on its own stack.
struct Warp {
    const char* primitive = nullptr;
    void* slots[32];
    int arrived = 0;
    Queue queue;
    std::vector<Issued> open_products;  // wgmma
    std::deque<std::vector<Issued>> product_groups;
    std::map<float*, std::shared_ptr<Accumulator>> sums;  // in flight, by the first lane's registers
    Work last_product;
    bool has_fenced = false;   // wgmma_fence since the last wgmma_wait
    size_t num_products = 0;
    int reader = -1;  // the slot of its groups
    uint32_t groups_committed = 0, groups_done = 0;
    int registers = 0;  // of each thread
    bool has_asked = false;  // for other registers
};

// What the four warps of a warpgroup must bring alike to a wgmma.
struct Product {
    const char* primitive;
    uint64_t a, b;
    int keep;
    bool operator==(const Product&) const = default;
};

struct NamedBarrier {
    int arrived = 0;
    int expected = 0;
    Queue queue;
    std::vector<uint32_t> left;  // what those knew that arrived and went on
};

struct PhaseBarrier {  // mbarrier
    int expected = 0;  // arrivals of a phase
    int pending = 0;
    int64_t bytes = 0;  // expected and not yet come
    uint32_t phase = 0;
    Queue queue;
    int slot = -1;
    std::vector<uint32_t> arrived;  // what those knew that have arrived
    Clock complete;                 // by the end of the last phase
    std::map<uint32_t, std::vector<uint32_t>> arrived_peers;  // those of other blocks of the cluster, by block
    std::shared_ptr<const Published> complete_peers;
};

// Blocks that run together.
struct Cluster {
    std::vector<Block*> blocks;  // by rank
    int arrived = 0, ended = 0;  // threads
    uint32_t phase = 0;
    std::map<uint32_t, std::vector<uint32_t>> left;  // what those knew that have arrived, by block
    std::shared_ptr<const Published> complete;
    Queue queue;
};

// A block that runs.
struct Block {
    uint3 index{};
    uint32_t number = 0;
    std::shared_ptr<Cluster> cluster;
    int rank = 0;
    std::map<std::pair<uint32_t, int>, uint32_t> visits;  // arrivals from other blocks: by block and thread, the last epoch
    std::map<int, uint32_t> landings;  // copies by other blocks: by slot of their mbarrier, the last phase
    bool is_running = false;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> ready;
    std::vector<Work> pending;
    std::vector<Warp> warps;
    std::vector<std::vector<Product>> products;  // by warpgroup, in order
    NamedBarrier barriers[16];
    std::map<uint32_t, PhaseBarrier> phase_barriers;  // by shared address
    int num_ended = 0;
    bool has_waited = false;  // for the previous kernel
    bool is_lazy = false;     // pending work happens only when it must
    unsigned char* shared;    // SHARED_LIMIT + GUARD bytes
    Races races;
    Foreign foreign;

    Block();
    ~Block();
};

struct Range {
    uintptr_t begin, end;
    bool is_constant;
    int64_t bytes_read = 0;  // by kernels, since it was made known
};

// A tensor map that a kernel is given.
struct MapRecord {
    std::vector<int64_t> sizes, box;  // elements, innermost first
    int element_bytes;
};

struct LaunchRecord {
    std::string name;
    uintptr_t address;  // of the kernel's function
    dim3 grid;
    int cluster;
    int threads, shared_bytes;
    bool is_dependent;
    std::vector<MapRecord> maps;  // in the order of the arguments
    Counts counts;                // if they are asked for
};

enum class Access { PLAIN, ATOMIC, COPY };

struct Machine {
    // What tests set.
    std::mt19937_64 random{0};
    int num_sms = 132;
    std::vector<Range> ranges;  // sorted
    std::vector<LaunchRecord> launches;
    bool is_dry = false;  // launches are noted and run nothing

    // The running launch.
    std::vector<std::unique_ptr<Block>> blocks;
    Block* block = nullptr;  // of the thread that runs
    Fiber* current = nullptr;
    Global global;
    std::vector<std::pair<uintptr_t, uintptr_t>> padding;  // begin and end of arrays that any thread may write: nobody needs them
    Counter counter;
    int num_threads = 0;
    int shared_bytes = 0;
    bool is_dependent = false;
    std::function<void()> body;
    std::exception_ptr error;
    void* scheduler_stack_pointer = nullptr;
    std::string kernel;
    bool is_running = false;

    void run(LaunchRecord how, std::function<void()> body);

    // Called by fibers.
    [[noreturn]] void fail(const std::string& what);
    void report(const std::string& what);  // without an exception: the thread ends at its next primitive
    void wait(Queue& queue, const char* where);
    void wake(Queue& queue);
    void yield();
    void maybe_yield();
    void submit(const Work& work) { submit(work, *block); }
    void submit(const Work& work, Block& target) {
        work->place = target.pending.size();
        target.pending.push_back(work);
    }
    void perform(const Work& work);
    // All lanes of a warp bring `slot`; the last to arrive runs `act` over the 32 slots.
    void meet(const char* primitive, void* slot, const std::function<void(void**)>& act);
    Warp& warp() { return block->warps[current->thread / 32]; }
    int lane() const { return current->thread % 32; }
    void arrive(int barrier, int threads, bool waits);
    void arrive_all();
    PhaseBarrier& phase_barrier(const void* address);
    void arrive(PhaseBarrier& barrier, int bytes);  // and expect bytes
    void complete(PhaseBarrier& barrier);
    bool has_observed(PhaseBarrier& barrier, uint32_t parity);
    Block& peer(int rank, const char* what);  // of the cluster, which must not have ended
    PhaseBarrier& phase_barrier(Block& target, const void* address);  // where `address` lies in this block
    void arrive_at(Block& target, const void* barrier);
    void arrive_in_cluster();
    void wait_for_cluster();
    int visitor_of(Block& target);  // the current thread, as the races of that block know it
    void meet(Queue& queue, std::vector<uint32_t>& others);  // the fibers of the queue and the current one

    uint32_t address_of_shared(const void* pointer, int bytes, const char* what);
    bool is_shared(const void* pointer) const {
        return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(block->shared) < uintptr_t(shared_bytes);
    }
    uint32_t offset_of(const void* pointer) const { return uint32_t(static_cast<const unsigned char*>(pointer) - block->shared); }
    unsigned char* async_place(uint32_t address, int bytes);  // of what the tensor core or the copy engine reads
    void check_global(const void* address, int bytes, bool is_write);
    void access_global(const void* address, int bytes, bool is_write, Access how = Access::PLAIN);  // checks, counts, tells the races
    bool was_waited() const { return !is_dependent || current == nullptr || current->has_waited; }

  private:
    void start_block(Block& one, uint32_t number);
    void complete_cluster(Cluster& cluster);
    void step();
    void end_block();
    void check_end();
    void enter(Block* one);
    void start(Fiber& fiber);
    void resume(Fiber& fiber);
    static void run_fiber();
    std::string place() const;
};

Machine& machine();

// While it lives, accesses are not tracked: of work that is done on behalf of a thread.
struct Untracked {
    uintptr_t bytes = tracked_bytes;
    Untracked() {
        tracked_bytes = 0;
        asm volatile("" ::: "memory");  // what is untracked stays between the two
    }
    ~Untracked() {
        asm volatile("" ::: "memory");
        tracked_bytes = bytes;
    }
};

}  // namespace nemo::emulated
