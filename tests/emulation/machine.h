// The machine: runs the threads of one block after another as fibers, in an order drawn from a seed.
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
#include "emulation/cuda.h"

namespace nemo::emulated {

constexpr uint32_t SHARED_BASE = 1024;  // the shared address of the first byte: not 0, and aligned for every swizzle
constexpr int SHARED_LIMIT = 227 * 1024;
constexpr int GUARD = 4096;  // poisoned bytes after the block's shared memory

struct Fiber;

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
};
using Work = std::shared_ptr<Pending>;

struct Fiber {
    void* stack_pointer = nullptr;
    std::unique_ptr<unsigned char[]> stack;
    uint3 index{};
    int thread = 0;
    bool is_ended = true;
    bool has_waited = false;  // for the previous kernel
    const char* waits_at = nullptr;
    std::vector<Work> open_copies;               // cp.async, not yet in a group
    std::deque<std::vector<Work>> copy_groups;   // cp.async
    std::vector<Work> open_stores;               // TMA stores
    std::deque<std::vector<Work>> store_groups;
};

// 32 lanes that meet at one primitive. `slots` point to what each lane brings, on its own stack.
struct Warp {
    const char* primitive = nullptr;
    void* slots[32];
    int arrived = 0;
    Queue queue;
    std::vector<Work> open_products;  // wgmma
    std::deque<std::vector<Work>> product_groups;
    Work last_product;
    bool has_fenced = false;   // wgmma_fence since the last wgmma_wait
    size_t num_products = 0;
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
};

struct PhaseBarrier {  // mbarrier
    int expected = 0;  // arrivals of a phase
    int pending = 0;
    int64_t bytes = 0;  // expected and not yet come
    uint32_t phase = 0;
    Queue queue;
};

struct Range {
    uintptr_t begin, end;
    bool is_constant;
};

struct LaunchRecord {
    std::string name;
    uintptr_t address;  // of the kernel's function
    dim3 grid;
    int threads, shared_bytes;
    bool is_dependent;
};

struct Machine {
    // What tests set.
    std::mt19937_64 random{0};
    int num_sms = 132;
    std::vector<Range> ranges;  // sorted
    std::vector<LaunchRecord> launches;
    bool is_dry = false;  // launches are noted and run nothing

    // The running block.
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> ready;
    std::vector<Work> pending;
    std::vector<Warp> warps;
    std::vector<std::vector<Product>> products;  // by warpgroup, in order
    NamedBarrier barriers[16];
    std::map<uint32_t, PhaseBarrier> phase_barriers;  // by shared address
    Fiber* current = nullptr;
    int num_threads = 0, num_ended = 0;
    bool is_dependent = false, has_block_waited = false;
    std::function<void()> body;
    std::exception_ptr error;
    void* scheduler_stack_pointer = nullptr;
    const char* kernel = "";
    bool is_running = false;

    unsigned char* shared = nullptr;  // of SHARED_LIMIT + GUARD bytes
    unsigned char* async_view = nullptr;  // what the async proxy sees of it
    int shared_bytes = 0;
    bool is_lazy = false;  // in this block pending work happens only when it must
    bool is_leaky = false;  // in this block the async proxy sees ordinary writes at once: nobody said that it must not
    bool is_fenced = false;  // ordinary writes since the async view was last brought up to date may be seen

    Machine();
    ~Machine();
    void run(const char* name, uintptr_t address, dim3 grid, int threads, int shared_bytes, bool is_dependent, std::function<void()> body);

    // Called by fibers.
    [[noreturn]] void fail(const std::string& what);
    void wait(Queue& queue, const char* where);
    void wake(Queue& queue);
    void yield();
    void maybe_yield();
    void submit(const Work& work) {
        work->place = pending.size();
        pending.push_back(work);
    }
    void perform(const Work& work);
    // All lanes of a warp bring `slot`; the last to arrive runs `act` over the 32 slots.
    void meet(const char* primitive, void* slot, const std::function<void(void**)>& act);
    Warp& warp() { return warps[current->thread / 32]; }
    int lane() const { return current->thread % 32; }
    void arrive(int barrier, int threads, bool waits);
    PhaseBarrier& phase_barrier(const void* address);
    void complete(PhaseBarrier& barrier);

    uint32_t address_of_shared(const void* pointer, int bytes, const char* what);
    unsigned char* async_read(uint32_t address, int bytes);  // a place in the async view
    void async_write(unsigned char* to, const void* from, int bytes);
    void check_global(const void* address, int bytes, bool is_write);
    bool was_waited() const { return !is_dependent || current == nullptr || current->has_waited; }

  private:
    void run_block();
    void poison();
    void start(Fiber& fiber);
    void resume(Fiber& fiber);
    static void enter();
    std::string place() const;
};

Machine& machine();

}  // namespace nemo::emulated
