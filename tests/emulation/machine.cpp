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

int planted = 0;  // which mistake is made (tests/test_planted_mistakes.py)
uintptr_t tracked_begin, tracked_bytes;
uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {
constexpr int STACK_BYTES = 128 * 1024;

void add(std::vector<uint32_t>& to, const std::vector<uint32_t>& more) {
    to.resize(std::max(to.size(), more.size()));
    for (size_t i = 0; i < more.size(); i++) to[i] = std::max(to[i], more[i]);
}
std::shared_ptr<const Published> published(const std::map<uint32_t, std::vector<uint32_t>>& clocks) {
    auto all = std::make_shared<Published>();
    for (const auto& [block, clock] : clocks) (*all)[block] = std::make_shared<const std::vector<uint32_t>>(clock);
    return all;
}
void learn_of_peers(Block& block, int thread, const std::shared_ptr<const Published>& what) {
    if (what->size() > what->count(block.number)) block.foreign.acquired.push_back({thread, block.races.advance(thread), what});
}
struct Ended {};  // unwinds a fiber whose block has failed
}  // namespace

Machine& machine() {
    static Machine one;
    return one;
}

Block::Block() : shared(static_cast<unsigned char*>(std::aligned_alloc(1024, SHARED_LIMIT + GUARD))) {
    races.report = [](const std::string& what) { machine().report(what); };
}
Block::~Block() { std::free(shared); }

void Machine::run(LaunchRecord how, std::function<void()> work) {
    launches.push_back(how);
    dim3 grid = how.grid;
    int threads = how.threads, bytes = how.shared_bytes;
    auto refuse = [&](auto&&... parts) { throw std::runtime_error(text("launch of ", how.name, ": ", parts...)); };
    if (is_running) refuse("another kernel runs");
    if (threads < 32 || threads > 1024 || threads % 32) refuse(threads, " threads, not whole warps up to 1024");
    if (bytes < 0 || bytes > SHARED_LIMIT) refuse(bytes, " bytes of shared memory, at most ", SHARED_LIMIT);
    if (how.cluster < 1 || how.cluster > 8 || grid.x % how.cluster) refuse("clusters of ", how.cluster, " blocks, 1 to 8 that divide ", grid.x);
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) refuse("a grid of ", grid.x, "x", grid.y, "x", grid.z);
    if (is_dry) return;
    kernel = how.name;
    counter.reset();
    num_threads = threads;
    shared_bytes = bytes;
    is_dependent = how.is_dependent;
    body = std::move(work);
    block_size = dim3(threads);
    grid_size = grid;
    is_running = true;
    size_t size = how.cluster;
    std::vector<uint32_t> waiting(size_t(grid.x) * grid.y * grid.z / size);  // clusters
    std::iota(waiting.begin(), waiting.end(), 0u);
    std::shuffle(waiting.begin(), waiting.end(), random);
    global.reset();
    size_t at_once = std::min(waiting.size(), size_t(1 + random() % ((MOST_BLOCKS + size - 1) / size)));
    while (blocks.size() < at_once * size) blocks.push_back(std::make_unique<Block>());
    size_t running = 0;
    for (;;) {
        for (size_t i = 0; i < at_once && !waiting.empty() && !error; i++) {
            auto first = blocks.begin() + i * size;
            if (std::any_of(first, first + size, [](auto& one) { return one->is_running; })) continue;
            auto cluster = std::make_shared<Cluster>();
            for (size_t rank = 0; rank < size; rank++) {
                Block& one = **(first + rank);
                one.cluster = cluster;
                one.rank = int(rank);
                cluster->blocks.push_back(&one);
                start_block(one, uint32_t(waiting.back() * size + rank));
                running++;
            }
            waiting.pop_back();
        }
        if (!running) break;
        step();
        if (block->num_ended == num_threads) {
            end_block();
            running--;
        }
    }
    enter(nullptr);
    is_running = false;
    launches.back().counts = counter.counts;
    body = nullptr;
    if (error) {
        auto caught = std::exchange(error, nullptr);
        std::rethrow_exception(caught);
    }
}

void Machine::enter(Block* one) {
    block = one;
    if (one) block_index = one->index;
}

void Machine::start_block(Block& one, uint32_t number) {
    enter(&one);
    one.number = number;
    one.index = block_index = {number % grid_size.x, number / grid_size.x % grid_size.y, number / grid_size.x / grid_size.y};
    one.is_running = true;
    std::memset(one.shared, 0xFF, shared_bytes + GUARD);
    one.is_lazy = random() % 2;
    one.warps.assign(num_threads / 32, Warp{});
    for (auto& warp : one.warps) warp.registers = std::min(255, REGISTERS / num_threads / 8 * 8);
    one.products.assign((num_threads + 127) / 128, {});
    for (auto& barrier : one.barriers) barrier = NamedBarrier{};
    one.phase_barriers.clear();
    one.visits.clear();
    one.landings.clear();
    one.pending.clear();
    one.ready.clear();
    one.num_ended = 0;
    one.has_waited = false;
    one.races.reset(num_threads, shared_bytes);
    one.foreign = {};
    while (int(one.fibers.size()) < num_threads) one.fibers.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < num_threads; i++) {
        one.fibers[i]->block = &one;
        one.fibers[i]->thread = i;
        start(*one.fibers[i]);
    }
}

// One thread of one block runs until it waits, or one piece of pending work is done.
void Machine::step() {
    auto offered = [&](Block& one) { return !error && (!one.is_lazy || one.ready.empty()) ? one.pending.size() : 0; };
    Block* chosen = nullptr;
    size_t count = 0;
    for (auto& one : blocks)
        if (one->is_running && one->ready.size() + offered(*one) && random() % ++count == 0) chosen = one.get();
    if (!chosen) {
        for (auto& one : blocks) {
            if (!one->is_running) continue;
            enter(one.get());
            std::map<std::string, int> places;
            for (int i = 0; i < num_threads; i++) {
                Fiber& fiber = *one->fibers[i];
                if (fiber.is_ended) continue;
                places[fiber.waits_at ? fiber.waits_at : "?"]++;
                one->ready.push_back(&fiber);  // so that it unwinds
            }
            std::string where;
            for (auto& [at, threads] : places) where += text(" ", threads, " at ", at, ",");
            where.back() = ';';
            if (!error)
                error = std::make_exception_ptr(std::runtime_error(
                    text("deadlock in ", kernel, ", block (", block_index.x, ", ", block_index.y, ", ", block_index.z,
                         "): threads wait:", where, " ", one->num_ended, " have ended")));
        }
        return;
    }
    enter(chosen);
    size_t choice = random() % (block->ready.size() + offered(*block));
    if (choice < block->ready.size()) {
        Fiber* fiber = block->ready[choice];
        block->ready[choice] = block->ready.back();
        block->ready.pop_back();
        resume(*fiber);
    } else {
        try {
            perform(Work(block->pending[choice - block->ready.size()]));
        } catch (...) {
            if (!error) error = std::current_exception();
        }
    }
}

void Machine::check_end() {
    auto refuse = [&](auto&&... parts) { throw std::runtime_error(text(kernel, ": ", parts...)); };
    for (int i = 0; i < num_threads; i++) {
        Fiber& fiber = *block->fibers[i];
        if (!fiber.open_stores.empty() || !fiber.store_groups.empty()) refuse("thread ", i, " ended before its TMA stores had left shared memory");
    }
    int registers = 0;
    bool has_asked = false;
    for (size_t i = 0; i < block->warps.size(); i++) {
        Warp& warp = block->warps[i];
        if (!warp.open_products.empty() || !warp.product_groups.empty()) refuse("warp ", i, " ended before its products of wgmma were done");
        if (warp.registers != block->warps[i / 4 * 4].registers) refuse("the warps of a warpgroup ask for different numbers of registers");
        registers += warp.registers * 32;
        has_asked |= warp.has_asked;
    }
    if (has_asked && registers > REGISTERS) refuse("the warps of a block ask for ", registers, " registers, a multiprocessor has ", REGISTERS);
    for (const auto& [visitor, epoch] : block->visits) {
        const auto& all = block->foreign.acquired;
        if (std::none_of(all.begin(), all.end(), [&](const Acquired& event) {
                auto found = event.what->find(visitor.first);
                return found != event.what->end() && (*found->second)[visitor.second] >= epoch;
            }))
            refuse("block number ", block->number, " ends while thread ", visitor.second, " of block number ", visitor.first,
                   " arrives at its mbarriers: nothing orders the two");
    }
    for (const auto& [slot, phase] : block->landings) {
        bool is_known = false;
        for (int i = 0; i < num_threads; i++) is_known |= block->races.knows(i, slot, phase);
        if (!is_known) refuse("block number ", block->number, " ends before a copy by another block of the cluster has come");
    }
    for (auto work : std::vector<Work>(block->pending)) perform(work);  // copies that nobody waited for
    for (int i = 0; i < GUARD; i++)
        if (block->shared[shared_bytes + i] != 0xFF) refuse("shared memory written ", i, " bytes past the end of ", shared_bytes, " bytes");
    if (is_dependent && !block->has_waited) refuse("a block ended without wait_for_previous_kernel");
}

void Machine::end_block() {
    if (!error) {
        try {
            check_end();
        } catch (...) {
            error = std::current_exception();
        }
    }
    for (int i = 0; i < num_threads; i++) {
        Fiber& fiber = *block->fibers[i];
        fiber.open_copies.clear();
        fiber.copy_groups.clear();
        fiber.open_stores.clear();
        fiber.store_groups.clear();
        fiber.reader = -1;
        fiber.stores_committed = fiber.stores_read = 0;
    }
    block->warps.clear();
    block->pending.clear();
    block->is_running = false;
    counter.end_block(block->number);
}

void Machine::start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<unsigned char[]>(STACK_BYTES);
    fiber.index = {unsigned(fiber.thread), 0, 0};
    fiber.is_ended = false;
    fiber.has_waited = fiber.is_in_cluster_barrier = false;
    fiber.waits_at = nullptr;
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK_BYTES) & ~uintptr_t(63);
#if defined(__x86_64__)
    auto* words = reinterpret_cast<uintptr_t*>(top) - 2;  // as if called: the stack is 8 off a multiple of 16
    words[0] = reinterpret_cast<uintptr_t>(&Machine::run_fiber);
    words[1] = 0;
    words -= SAVED_WORDS;
    std::fill(words, words + SAVED_WORDS, 0);
#else
    auto* words = reinterpret_cast<uintptr_t*>(top - 160);
    std::fill(words, words + 20, 0);
    words[11] = reinterpret_cast<uintptr_t>(&Machine::run_fiber);  // x30
#endif
    fiber.stack_pointer = words;
    fiber.block->ready.push_back(&fiber);
}

void Machine::resume(Fiber& fiber) {
    current = &fiber;
    thread_index = fiber.index;
    tracked_begin = reinterpret_cast<uintptr_t>(block->shared);
    tracked_bytes = shared_bytes;
    nemo_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
    current = nullptr;
    tracked_bytes = 0;
}

void Machine::run_fiber() {
    Machine& m = machine();
    try {
        if (!m.error) m.body();
    } catch (const Ended&) {
    } catch (...) {
        if (!m.error) m.error = std::current_exception();
    }
    Fiber& fiber = *m.current;
    fiber.is_ended = true;
    m.block->num_ended++;
    Cluster& cluster = *m.block->cluster;
    cluster.ended++;
    if (fiber.is_in_cluster_barrier) m.report("a thread ends between cluster_arrive and cluster_wait");
    if (!m.error) m.complete_cluster(cluster);
    NamedBarrier& all = m.block->barriers[0];
    if (!m.error && all.arrived && all.arrived == m.num_threads - m.block->num_ended) {
        all.arrived = 0;
        m.meet(all.queue, all.left);
        m.wake(all.queue);
    }
    nemo_switch_stack(&fiber.stack_pointer, m.scheduler_stack_pointer);
    std::abort();  // nobody resumes a fiber that has ended
}

std::string Machine::place() const {
    std::string where = text(", in ", kernel, ", block (", block_index.x, ", ", block_index.y, ", ", block_index.z, ")");
    return current ? where + text(", thread ", current->thread) : where;
}

void Machine::fail(const std::string& what) { throw std::runtime_error(what + place()); }

void Machine::report(const std::string& what) {
    if (!error) error = std::make_exception_ptr(std::runtime_error(what + place()));
}

void Machine::wait(Queue& queue, const char* where) {
    queue.fibers.push_back(current);
    current->waits_at = where;
    Fiber& self = *current;
    nemo_switch_stack(&self.stack_pointer, scheduler_stack_pointer);
    if (error) throw Ended{};
    self.waits_at = nullptr;
}

void Machine::wake(Queue& queue) {
    for (Fiber* fiber : queue.fibers) fiber->block->ready.push_back(fiber);
    queue.fibers.clear();
}

void Machine::yield() {
    block->ready.push_back(current);
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
    auto& pending = block->pending;
    pending[work->place] = pending.back();
    pending[work->place]->place = work->place;
    pending.pop_back();
    Untracked untracked;
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
    NamedBarrier& barrier = block->barriers[id];
    if (barrier.arrived && barrier.expected != threads)
        fail(text("named barrier ", id, " of ", barrier.expected, " threads is used with ", threads));
    barrier.expected = threads;
    bool is_complete = ++barrier.arrived == threads;
    if (!waits) block->races.release(current->thread, barrier.left);
    if (is_complete) {
        barrier.arrived = 0;
        if (waits) barrier.queue.fibers.push_back(current);
        meet(barrier.queue, barrier.left);
        if (waits) barrier.queue.fibers.pop_back();
        wake(barrier.queue);
        maybe_yield();
    } else if (waits) {
        wait(barrier.queue, "a named barrier");
    }
}

void Machine::arrive_all() {
    NamedBarrier& barrier = block->barriers[0];
    if (++barrier.arrived == num_threads - block->num_ended) {
        barrier.arrived = 0;
        barrier.queue.fibers.push_back(current);
        meet(barrier.queue, barrier.left);
        barrier.queue.fibers.pop_back();
        wake(barrier.queue);
        maybe_yield();
    } else {
        wait(barrier.queue, "block_sync");
    }
}

// What any of these threads knows, all know from here on.
void Machine::meet(Queue& queue, std::vector<uint32_t>& others) {
    std::vector<int> threads;
    for (Fiber* fiber : queue.fibers) threads.push_back(fiber->thread);
    if (!threads.empty()) block->races.meet(threads, others);
    others.clear();
}

PhaseBarrier& Machine::phase_barrier(const void* address) {
    auto found = block->phase_barriers.find(address_of_shared(address, 8, "an mbarrier"));
    if (found == block->phase_barriers.end()) fail("an mbarrier is used that was not initialised");
    if (current) block->races.look(current->thread, offset_of(address), 8);
    return found->second;
}

void Machine::arrive(PhaseBarrier& barrier, int bytes) {
    if (bytes < 0 || barrier.bytes + bytes > MOST_BYTES_OF_A_PHASE)
        fail(text("an mbarrier expects ", barrier.bytes + bytes, " bytes in a phase, at most ", MOST_BYTES_OF_A_PHASE));
    block->races.release(current->thread, barrier.arrived);
    barrier.bytes += bytes;
    barrier.pending--;
    complete(barrier);
    maybe_yield();
}

void Machine::complete(PhaseBarrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at an mbarrier than it expects");
    if (barrier.bytes < -MOST_BYTES_OF_A_PHASE) fail(text("more than ", MOST_BYTES_OF_A_PHASE, " bytes came that an mbarrier did not expect"));
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase++;
        barrier.pending = barrier.expected;
        barrier.arrived.resize(std::max(barrier.arrived.size(), size_t(barrier.slot) + 1));
        auto clock = std::make_shared<std::vector<uint32_t>>(barrier.arrived);
        clock->at(barrier.slot) = barrier.phase;
        barrier.complete = clock;
        if (!barrier.arrived_peers.empty()) barrier.complete_peers = published(barrier.arrived_peers);
        wake(barrier.queue);
    }
}

// Whether the phase of this parity is complete; if it is, the thread knows what those knew that completed it.
bool Machine::has_observed(PhaseBarrier& barrier, uint32_t parity) {
    if ((barrier.phase & 1) == (parity & 1)) return false;
    if (barrier.complete) block->races.acquire(current->thread, barrier.complete);
    if (barrier.complete_peers) learn_of_peers(*block, current->thread, barrier.complete_peers);
    return true;
}

// ---- clusters

Block& Machine::peer(int rank, const char* what) {
    if (rank < 0 || rank >= int(block->cluster->blocks.size())) fail(text(what, ": block ", rank, " of a cluster of ", block->cluster->blocks.size()));
    Block& target = *block->cluster->blocks[rank];
    if (!target.is_running || target.cluster != block->cluster) fail(text(what, ": block ", rank, " of the cluster has ended"));
    return target;
}

int Machine::visitor_of(Block& target) {
    if (&target == block) return current->thread;
    std::vector<uint32_t> all(*target.races.nothing());
    const Published* last = nullptr;
    for (const auto& event : block->foreign.acquired) {
        if (event.what.get() == last || !block->races.knows(current->thread, event.thread, event.epoch)) continue;
        last = event.what.get();
        auto found = last->find(target.number);
        if (found == last->end()) continue;
        for (size_t i = 0; i < found->second->size(); i++) all[i] = std::max(all[i], (*found->second)[i]);
    }
    return target.races.admit(std::make_shared<const std::vector<uint32_t>>(std::move(all)));
}

PhaseBarrier& Machine::phase_barrier(Block& target, const void* address) {
    if (&target == block) return phase_barrier(address);
    auto found = target.phase_barriers.find(address_of_shared(address, 8, "an mbarrier"));
    if (found == target.phase_barriers.end()) fail(text("an mbarrier of block ", target.rank, " of the cluster is used that was not initialised"));
    target.races.look(visitor_of(target), offset_of(address), 8);
    return found->second;
}

void Machine::arrive_at(Block& target, const void* address) {
    PhaseBarrier& barrier = phase_barrier(target, address);
    int thread = current->thread;
    target.visits[{block->number, thread}] = block->races.epoch(thread);
    add(barrier.arrived_peers[block->number], *block->races.clock_of(thread));
    block->races.advance(thread);
    barrier.pending--;
    complete(barrier);
    maybe_yield();
}

void Machine::arrive_in_cluster() {
    Cluster& cluster = *block->cluster;
    if (current->is_in_cluster_barrier) fail("cluster_arrive twice without cluster_wait");
    current->is_in_cluster_barrier = true;
    current->cluster_phase = cluster.phase;
    add(cluster.left[block->number], *block->races.clock_of(current->thread));
    block->races.advance(current->thread);
    cluster.arrived++;
    complete_cluster(cluster);
    maybe_yield();
}

void Machine::complete_cluster(Cluster& cluster) {
    if (!cluster.arrived || cluster.arrived + cluster.ended < int(cluster.blocks.size()) * num_threads) return;
    cluster.arrived = 0;
    cluster.phase++;
    cluster.complete = published(cluster.left);
    wake(cluster.queue);
}

void Machine::wait_for_cluster() {
    Cluster& cluster = *block->cluster;
    if (!current->is_in_cluster_barrier) fail("cluster_wait without cluster_arrive");
    while (cluster.phase == current->cluster_phase) wait(cluster.queue, "cluster_wait");
    current->is_in_cluster_barrier = false;
    block->races.acquire(current->thread, cluster.complete->at(block->number));
    learn_of_peers(*block, current->thread, cluster.complete);
    maybe_yield();
}

uint32_t Machine::address_of_shared(const void* pointer, int bytes, const char* what) {
    auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
    if (offset < 0 || offset + bytes > shared_bytes)
        fail(text(what, ": ", bytes, " bytes at offset ", offset, " are not within the ", shared_bytes,
                  " bytes of shared memory"));
    return SHARED_BASE + uint32_t(offset);
}

unsigned char* Machine::async_place(uint32_t address, int bytes) {
    int64_t offset = int64_t(address) - SHARED_BASE;
    if (offset < 0 || offset + bytes > shared_bytes)
        fail(text("the tensor core or the copy engine reads ", bytes, " bytes at offset ", offset, " of ", shared_bytes,
                  " bytes of shared memory"));
    return block->shared + offset;
}

void Machine::access_global(const void* address, int bytes, bool is_write, Access how) {
    check_global(address, bytes, is_write);
    if (how == Access::COPY) {
        counter.copy(address, bytes, is_write);
    } else {
        counter.access(block->number, current->thread, __builtin_return_address(0), address, bytes, is_write);
    }
    auto at = reinterpret_cast<uintptr_t>(address);
    for (auto [begin, end] : padding)
        if (begin <= at && at < end) return;
    global.access(block->races, block->foreign, block->number, current->thread, address, bytes, is_write, how == Access::ATOMIC);
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
    Range& range = ranges[last];
    if (begin < range.begin || begin + bytes > range.end) {
        bool is_before = begin < range.begin;
        fail(text(what, " of ", bytes, " bytes at ", address, ", ",
                  is_before ? range.begin - begin : begin + bytes - range.end, " bytes ",
                  is_before ? "before the start" : "past the end", " of the nearest array, of ", range.end - range.begin,
                  " bytes"));
    }
    if (!was_waited() && (is_write || !range.is_constant)) fail(text(what, " before wait_for_previous_kernel"));
    if (!is_write) range.bytes_read += bytes;
}

}  // namespace nemo::emulated
