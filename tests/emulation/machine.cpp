// The scheduler of emulated threads, their barriers, and the checks of memory.
#include "emulation/machine.h"


#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulation switches stacks in assembly for x86-64 and aarch64 only"
#endif

// Saves the callee-saved registers on the running stack, its pointer in *from, and goes on where `to` was left.
extern "C" void nemo_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl nemo_switch_stack
.type nemo_switch_stack, @function
nemo_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size nemo_switch_stack, .-nemo_switch_stack
)");
constexpr int SAVED_WORDS = 6;
#else
asm(R"(
.text
.globl nemo_switch_stack
.type nemo_switch_stack, %function
nemo_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size nemo_switch_stack, .-nemo_switch_stack
)");
#endif

namespace nemo::emulated {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {
constexpr int STACK_BYTES = 128 * 1024;
struct Ended {};  // unwinds a fiber whose block has failed
}  // namespace

Machine& machine() {
    static Machine one;
    return one;
}

Machine::Machine() {
    shared = static_cast<unsigned char*>(std::aligned_alloc(1024, SHARED_LIMIT + GUARD));
    async_view = static_cast<unsigned char*>(std::aligned_alloc(1024, SHARED_LIMIT + GUARD));
}
Machine::~Machine() {
    std::free(shared);
    std::free(async_view);
}

void Machine::run(const char* name, uintptr_t address, dim3 grid, int threads, int bytes, bool dependent, std::function<void()> work) {
    launches.push_back({name, address, grid, threads, bytes, dependent});
    auto refuse = [&](auto&&... parts) { throw std::runtime_error(text("launch of ", name, ": ", parts...)); };
    if (is_running) refuse("another kernel runs");
    if (threads < 32 || threads > 1024 || threads % 32) refuse(threads, " threads, not whole warps up to 1024");
    if (bytes < 0 || bytes > SHARED_LIMIT) refuse(bytes, " bytes of shared memory, at most ", SHARED_LIMIT);
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) refuse("a grid of ", grid.x, "x", grid.y, "x", grid.z);
    if (is_dry) return;
    kernel = name;
    num_threads = threads;
    shared_bytes = bytes;
    is_dependent = dependent;
    body = std::move(work);
    block_size = dim3(threads);
    grid_size = grid;
    is_running = true;
    std::vector<uint32_t> order(size_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (uint32_t block : order) {
        block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block();
        if (error) break;
    }
    is_running = false;
    body = nullptr;
    if (error) {
        auto caught = std::exchange(error, nullptr);
        std::rethrow_exception(caught);
    }
}

void Machine::poison() {
    std::memset(shared, 0xFF, shared_bytes + GUARD);
    std::memset(async_view, 0xFF, shared_bytes + GUARD);
    is_fenced = false;
}

void Machine::run_block() {
    poison();
    is_lazy = random() % 2;
    is_leaky = random() % 4 == 0;
    warps.assign(num_threads / 32, Warp{});
    products.assign((num_threads + 127) / 128, {});
    for (auto& barrier : barriers) barrier = NamedBarrier{};
    phase_barriers.clear();
    pending.clear();
    ready.clear();
    num_ended = 0;
    has_block_waited = false;
    while (int(fibers.size()) < num_threads) fibers.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < num_threads; i++) {
        fibers[i]->thread = i;
        start(*fibers[i]);
    }
    while (num_ended < num_threads) {
        bool is_offered = !error && (!is_lazy || ready.empty());
        size_t choices = ready.size() + (is_offered ? pending.size() : 0);
        if (choices == 0) {
            if (!error) {
                std::map<std::string, int> places;
                for (int i = 0; i < num_threads; i++)
                    if (!fibers[i]->is_ended) places[fibers[i]->waits_at ? fibers[i]->waits_at : "?"]++;
                std::string where;
                for (auto& [at, count] : places) where += text(" ", count, " at ", at, ",");
                where.back() = ';';
                error = std::make_exception_ptr(std::runtime_error(
                    text("deadlock in ", kernel, ", block (", block_index.x, ", ", block_index.y, ", ", block_index.z,
                         "): threads wait:", where, " ", num_ended, " have ended")));
            }
            for (int i = 0; i < num_threads; i++)  // so that they unwind
                if (!fibers[i]->is_ended) ready.push_back(fibers[i].get());
            continue;
        }
        size_t choice = random() % choices;
        if (choice < ready.size()) {
            Fiber* fiber = ready[choice];
            ready[choice] = ready.back();
            ready.pop_back();
            resume(*fiber);
        } else {
            Work work = pending[choice - ready.size()];
            try {
                perform(work);
            } catch (...) {
                error = std::current_exception();
            }
        }
    }
    if (!error) {
        try {
            for (int i = 0; i < num_threads; i++)
                if (!fibers[i]->open_stores.empty() || !fibers[i]->store_groups.empty())
                    throw std::runtime_error(text(kernel, ": thread ", i, " ended before its TMA stores had left shared memory"));
            for (auto work : std::vector<Work>(pending)) perform(work);  // copies that nobody waited for
            for (int i = 0; i < GUARD; i++)
                if (shared[shared_bytes + i] != 0xFF)
                    throw std::runtime_error(text(kernel, ": shared memory written ", i, " bytes past the end of ",
                                                  shared_bytes, " bytes"));
            if (is_dependent && !has_block_waited)
                throw std::runtime_error(text(kernel, ": a block ended without wait_for_previous_kernel"));
        } catch (...) {
            error = std::current_exception();
        }
    }
    for (int i = 0; i < num_threads; i++) {
        Fiber& fiber = *fibers[i];
        fiber.open_copies.clear();
        fiber.copy_groups.clear();
        fiber.open_stores.clear();
        fiber.store_groups.clear();
    }
    warps.clear();
    pending.clear();
}

void Machine::start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(STACK_BYTES);
    fiber.index = {unsigned(fiber.thread), 0, 0};
    fiber.is_ended = false;
    fiber.has_waited = false;
    fiber.waits_at = nullptr;
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK_BYTES) & ~uintptr_t(63);
#if defined(__x86_64__)
    auto* words = reinterpret_cast<uintptr_t*>(top) - 2;  // as if called: the stack is 8 off a multiple of 16
    words[0] = reinterpret_cast<uintptr_t>(&Machine::enter);
    words[1] = 0;
    words -= SAVED_WORDS;
    std::fill(words, words + SAVED_WORDS, 0);
#else
    auto* words = reinterpret_cast<uintptr_t*>(top - 160);
    std::fill(words, words + 20, 0);
    words[11] = reinterpret_cast<uintptr_t>(&Machine::enter);  // x30
#endif
    fiber.stack_pointer = words;
    ready.push_back(&fiber);
}

void Machine::resume(Fiber& fiber) {
    current = &fiber;
    thread_index = fiber.index;
    nemo_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
    current = nullptr;
}

void Machine::enter() {
    Machine& m = machine();
    try {
        if (!m.error) m.body();
    } catch (const Ended&) {
    } catch (...) {
        if (!m.error) m.error = std::current_exception();
    }
    Fiber& fiber = *m.current;
    fiber.is_ended = true;
    m.num_ended++;
    if (!m.error) {
        NamedBarrier& all = m.barriers[0];
        if (all.arrived && all.arrived == m.num_threads - m.num_ended) {
            all.arrived = 0;
            m.wake(all.queue);
        }
    }
    nemo_switch_stack(&fiber.stack_pointer, m.scheduler_stack_pointer);
    std::abort();  // nobody resumes a fiber that has ended
}

std::string Machine::place() const {
    std::string where = text(", in ", kernel, ", block (", block_index.x, ", ", block_index.y, ", ", block_index.z, ")");
    return current ? where + text(", thread ", current->thread) : where;
}

void Machine::fail(const std::string& what) { throw std::runtime_error(what + place()); }

void Machine::wait(Queue& queue, const char* where) {
    queue.fibers.push_back(current);
    current->waits_at = where;
    Fiber& self = *current;
    nemo_switch_stack(&self.stack_pointer, scheduler_stack_pointer);
    if (error) throw Ended{};
    self.waits_at = nullptr;
}

void Machine::wake(Queue& queue) {
    ready.insert(ready.end(), queue.fibers.begin(), queue.fibers.end());
    queue.fibers.clear();
}

void Machine::yield() {
    ready.push_back(current);
    Fiber& self = *current;
    nemo_switch_stack(&self.stack_pointer, scheduler_stack_pointer);
    if (error) throw Ended{};
}

void Machine::maybe_yield() {
    if (random() % 16 == 0) yield();
}

void Machine::perform(const Work& work) {
    if (work->is_done) return;
    if (work->before) perform(work->before);
    work->before = nullptr;
    work->is_done = true;
    pending[work->place] = pending.back();
    pending[work->place]->place = work->place;
    pending.pop_back();
    work->perform();
    work->perform = nullptr;
}

void Machine::meet(const char* primitive, void* slot, const std::function<void(void**)>& act) {
    Warp& w = warp();
    if (w.arrived && std::strcmp(w.primitive, primitive) != 0)
        fail(text("lanes of one warp are at ", w.primitive, " and at ", primitive));
    w.primitive = primitive;
    w.slots[lane()] = slot;
    if (++w.arrived < 32) {
        wait(w.queue, primitive);
        return;
    }
    w.arrived = 0;
    act(w.slots);
    wake(w.queue);
    maybe_yield();
}

void Machine::arrive(int id, int threads, bool waits) {
    if (id < 0 || id > 15) fail(text("named barrier ", id, ", there are 0 to 15"));
    if (threads % 32 || threads <= 0) fail(text("named barrier ", id, " of ", threads, " threads, not whole warps"));
    NamedBarrier& barrier = barriers[id];
    if (barrier.arrived && barrier.expected != threads)
        fail(text("named barrier ", id, " of ", barrier.expected, " threads is used with ", threads));
    barrier.expected = threads;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        wake(barrier.queue);
        maybe_yield();
    } else if (waits) {
        wait(barrier.queue, "a named barrier");
    }
}

PhaseBarrier& Machine::phase_barrier(const void* address) {
    auto found = phase_barriers.find(address_of_shared(address, 8, "an mbarrier"));
    if (found == phase_barriers.end()) fail("an mbarrier is used that was not initialised");
    return found->second;
}

void Machine::complete(PhaseBarrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at an mbarrier than it expects");
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase++;
        barrier.pending = barrier.expected;
        wake(barrier.queue);
    }
}

uint32_t Machine::address_of_shared(const void* pointer, int bytes, const char* what) {
    auto offset = static_cast<const unsigned char*>(pointer) - shared;
    if (offset < 0 || offset + bytes > shared_bytes)
        fail(text(what, ": ", bytes, " bytes at offset ", offset, " are not within the ", shared_bytes,
                  " bytes of shared memory"));
    return SHARED_BASE + uint32_t(offset);
}

unsigned char* Machine::async_read(uint32_t address, int bytes) {
    if (is_fenced && !is_leaky) std::memcpy(async_view, shared, shared_bytes);
    is_fenced = false;
    int64_t offset = int64_t(address) - SHARED_BASE;
    if (offset < 0 || offset + bytes > shared_bytes)
        fail(text("the tensor core or the copy engine reads ", bytes, " bytes at offset ", offset, " of ", shared_bytes,
                  " bytes of shared memory"));
    return (is_leaky ? shared : async_view) + offset;
}

void Machine::async_write(unsigned char* to, const void* from, int bytes) {
    std::memcpy(to, from, bytes);
    std::memcpy(async_view + (to - shared), from, bytes);
}

void Machine::check_global(const void* address, int bytes, bool is_write) {
    auto begin = reinterpret_cast<uintptr_t>(address);
    const char* what = is_write ? "write" : "read";
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && begin % bytes)
        fail(text(what, " of ", bytes, " bytes at ", address, ", which is not aligned"));
    if (ranges.empty()) {
        if (!was_waited() && is_write) fail("write before wait_for_previous_kernel");
        return;
    }
    static thread_local size_t last = 0;
    if (last >= ranges.size() || begin < ranges[last].begin || begin >= ranges[last].end) {
        auto after = std::upper_bound(ranges.begin(), ranges.end(), begin,
                                      [](uintptr_t at, const Range& range) { return at < range.begin; });
        last = after == ranges.begin() ? 0 : after - ranges.begin() - 1;
    }
    const Range& range = ranges[last];
    if (begin < range.begin || begin + bytes > range.end) {
        bool is_before = begin < range.begin;
        fail(text(what, " of ", bytes, " bytes at ", address, ", ",
                  is_before ? range.begin - begin : begin + bytes - range.end, " bytes ",
                  is_before ? "before the start" : "past the end", " of the nearest array, of ", range.end - range.begin,
                  " bytes"));
    }
    if (!was_waited() && (is_write || !range.is_constant)) fail(text(what, " before wait_for_previous_kernel"));
}

}  // namespace nemo::emulated
