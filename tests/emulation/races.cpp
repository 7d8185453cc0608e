// Clocks of threads, and the stamps of accesses to shared memory.
#include "emulation/races.h"

#include <algorithm>
#include <bit>

#include "common/check.h"

namespace nemo::emulated {

void Races::reset(int threads, int shared_bytes) {
    num_threads = threads;
    num_slots = threads + BARRIERS + READERS;
    num_barriers = num_readers = 0;
    epochs.assign(num_slots + 1, 1);
    bases.assign(num_slots + 1, nothing());
    fences.assign(threads, {});
    size_t cells = (shared_bytes + CELL - 1) / CELL, chunks = (shared_bytes + CHUNK - 1) / CHUNK;
    writes.assign(cells, {});
    reads.assign(2 * cells, {});
    more_reads.assign(cells, 0);
    crowds.clear();
    async_reads.assign(chunks * READERS, 0);
    box_of.assign(chunks, 0);
    boxes.clear();
    fine.assign(num_slots + 1, {});
    joins.fill({});
    last_lesson = {};
}

// ---- order

Clock Races::clock_of(int thread) const {
    auto all = std::make_shared<std::vector<uint32_t>>(*bases[thread]);
    (*all)[thread] = epochs[thread];
    return all;
}

void Races::release(int thread, std::vector<uint32_t>& into) {
    const auto& base = *bases[thread];
    into.resize(num_slots);
    for (int i = 0; i < num_slots; i++) into[i] = std::max(into[i], base[i]);
    into[thread] = std::max(into[thread], epochs[thread]++);
}

Clock Races::join(const Clock& base, const Clock& other) {
    if (base == other) return base;
    auto number = (reinterpret_cast<uintptr_t>(base.get()) ^ reinterpret_cast<uintptr_t>(other.get())) >> 4;
    Join& before = joins[(number ^ number >> 4) % joins.size()];
    if (before.base == base && before.other == other) return before.joined;
    auto both = std::make_shared<std::vector<uint32_t>>(*base);
    for (int i = 0; i < num_slots; i++) (*both)[i] = std::max((*both)[i], (*other)[i]);
    before = {base, other, both};
    return both;
}

void Races::acquire(int thread, const Clock& clock) { bases[thread] = join(bases[thread], clock); }

void Races::learn(int thread, int slot, uint32_t value) {
    if (knows(thread, slot, value)) return;
    if (last_lesson.base != bases[thread] || last_lesson.slot != slot || last_lesson.value != value) {
        auto more = std::make_shared<std::vector<uint32_t>>(*bases[thread]);
        (*more)[slot] = value;
        last_lesson = {bases[thread], more, slot, value};
    }
    bases[thread] = last_lesson.more;
}

void Races::meet(const std::vector<int>& threads, const std::vector<uint32_t>& others) {
    std::vector<const std::vector<uint32_t>*> seen;
    for (int thread : threads)
        if (seen.empty() || seen.back() != bases[thread].get()) seen.push_back(bases[thread].get());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    auto all = std::make_shared<std::vector<uint32_t>>(others);
    all->resize(num_slots);
    for (auto* one : seen)
        for (int i = 0; i < num_slots; i++) (*all)[i] = std::max((*all)[i], (*one)[i]);
    for (int thread : threads) (*all)[thread] = std::max((*all)[thread], epochs[thread]++);
    for (int thread : threads) bases[thread] = all;
}

void Races::fence(int thread) { fences[thread].push_back(epochs[thread]++); }

int Races::new_barrier() {
    if (num_barriers == BARRIERS) throw std::runtime_error(text("more than ", BARRIERS, " mbarriers in a block"));
    return num_threads + num_barriers++;
}
int Races::new_reader() {
    if (num_readers == READERS) throw std::runtime_error(text("more than ", READERS, " warps and threads of a block use wgmma and TMA stores"));
    return num_threads + BARRIERS + num_readers++;
}

// ---- accesses

std::string Races::name(const Stamp& stamp) const {
    if (stamp.kind == Kind::ASYNC) return text("a copy of the copy engine (phase ", stamp.value - 1, " of the block's mbarrier ", stamp.slot - num_threads, ")");
    return text(stamp.kind == Kind::COPY ? "a cp.async of thread " : stamp.kind == Kind::ATOMIC ? "an atomic of thread " : "thread ", stamp.slot);
}

void Races::say(int thread, const char* verb, uint32_t cell, const std::string& what) {
    std::string who = thread < num_threads ? text("thread ", thread) : "a thread of another block of the cluster";
    report(text("race in shared memory: ", who, " ", verb, " offset ", cell * CELL, ", ", what));
}

// Whether what is there may be read or replaced.
bool Races::check_write(int thread, uint32_t cell, const Stamp& mine, const char* verb) {
    const Stamp& before = writes[cell];
    if (!(before.mask & mine.mask)) return true;
    if (before.kind == Kind::ATOMIC && mine.kind == Kind::ATOMIC) return true;
    if (before.kind != Kind::COPY && knows(thread, before.slot, before.value)) return true;
    say(thread, verb, cell, text("which ", name(before), " has written",
                                 before.kind == Kind::COPY ? " and not waited for" : " and nothing orders the two"));
    return false;
}

bool Races::check_readers(int thread, uint32_t cell, uint8_t mask, const char* verb) {
    auto complain = [&](int reader) {
        say(thread, verb, cell, text("which thread ", reader, " reads and nothing orders the two"));
        return false;
    };
    for (int i = 0; i < 2; i++) {
        const Stamp& read = reads[2 * cell + i];
        if (read.mask & mask && !knows(thread, read.slot, read.value)) return complain(read.slot);
    }
    if (more_reads[cell]) {
        auto& crowd = crowds[more_reads[cell] - 1];
        for (int reader = 0; reader < num_threads; reader++)
            if (crowd[reader] && !knows(thread, reader, crowd[reader])) return complain(reader);
    }
    return true;
}

bool Races::check_async_readers(int thread, uint32_t chunk, const char* verb) {
    for (int i = 0; i < num_readers; i++) {
        if (knows(thread, num_threads + BARRIERS + i, async_reads[chunk * READERS + i])) continue;
        say(thread, verb, chunk * CHUNK / CELL, "which the tensor cores or the copy engine still read: nobody has waited for that, or nothing orders the wait and this");
        return false;
    }
    return true;
}

void Races::note_read(int thread, uint32_t cell, uint8_t mask) {
    Stamp mine{epochs[thread], uint16_t(thread), mask, Kind::PLAIN};
    Stamp* two = &reads[2 * cell];
    if (two[0].slot == thread && two[0].mask == mask) return void(two[0] = mine);
    if (two[1].slot == thread && two[1].mask == mask) return void(two[1] = mine);
    for (int i = 0; i < 2; i++)  // what happened before this one is implied by it
        if (!(two[i].mask & ~mask) && knows(thread, two[i].slot, two[i].value)) return void(two[i] = mine);
    if (!more_reads[cell]) {
        crowds.emplace_back(num_threads, 0);
        more_reads[cell] = uint32_t(crowds.size());
    }
    crowds[more_reads[cell] - 1][thread] = mine.value;
}

void Races::access(int thread, uint32_t offset, int bytes, bool is_write, bool is_atomic) {
    const char* verb = is_atomic ? "changes by an atomic" : is_write ? "writes" : "reads";
    uint32_t end = offset + bytes;
    for (uint32_t cell = offset / CELL; cell * CELL < end; cell++) {
        uint32_t from = std::max(offset, cell * CELL) - cell * CELL, to = std::min(end - cell * CELL, uint32_t(CELL));
        auto mask = uint8_t((1u << to) - (1u << from));
        Stamp mine{epochs[thread], uint16_t(thread), mask, is_atomic ? Kind::ATOMIC : Kind::PLAIN};
        if (writes[cell] == mine && is_write && !reads[2 * cell].mask) continue;
        if (!check_write(thread, cell, mine, verb)) return;
        if (!is_write) {
            note_read(thread, cell, mask);
            continue;
        }
        if (!check_readers(thread, cell, mask, verb) || !check_async_readers(thread, cell * CELL / CHUNK, verb)) return;
        writes[cell] = mine;
        reads[2 * cell] = reads[2 * cell + 1] = {};
        more_reads[cell] = 0;
        box_of[cell * CELL / CHUNK] = 0;
    }
}

void Races::look(int thread, uint32_t offset, int bytes) {
    for (uint32_t cell = offset / CELL; cell * CELL < offset + bytes; cell++)
        if (!check_write(thread, cell, {0, 0, 15, Kind::PLAIN}, "uses the mbarrier at")) return;
}

void Races::start_copy(int thread, uint32_t offset) {
    access(thread, offset, CHUNK, true);
    finish_copy(offset, {epochs[thread], uint16_t(thread), 15, Kind::COPY});
}

void Races::finish_copy(uint32_t offset, const Stamp& stamp) {
    for (int i = 0; i < CHUNK / CELL; i++) writes[offset / CELL + i] = stamp;
}

void Races::finish_own_copy(int thread, uint32_t offset) {
    for (int i = 0; i < CHUNK / CELL; i++) {
        Stamp& stamp = writes[offset / CELL + i];
        if (stamp.kind == Kind::COPY && stamp.slot == thread) stamp = {epochs[thread], uint16_t(thread), 15, Kind::PLAIN};
    }
}

// ---- the async proxy

// Whether the writing thread has fenced after its write, and this one knows it.
bool Races::is_published(int thread, const Stamp& stamp) const {
    if (stamp.kind == Kind::ASYNC || stamp.kind == Kind::NONE) return true;
    const auto& all = fences[stamp.slot];
    auto first = std::lower_bound(all.begin(), all.end(), stamp.value);
    return first != all.end() && knows(thread, stamp.slot, *first);
}

bool Races::check_async_read(int thread, uint32_t cell, const char* verb, bool is_quiet) {
    const Stamp& before = writes[cell];
    if (before == fine[thread] || before.kind == Kind::NONE) return true;
    if (before.kind == Kind::COPY || !knows(thread, before.slot, before.value)) {
        return is_quiet ? false : check_write(thread, cell, {0, 0, 15, Kind::PLAIN}, verb);
    }
    if (!is_published(thread, before)) {
        if (!is_quiet) say(thread, verb, cell, text("which ", name(before), " has written without a fence_async_proxy after it that this thread knows of"));
        return false;
    }
    fine[thread] = before;
    return true;
}

void Races::load_box(int thread, uint32_t offset, int bytes, int barrier, uint32_t phase) {
    const char* verb = "has the copy engine write to";
    Stamp mine{phase + 1, uint16_t(barrier), 15, Kind::ASYNC};
    boxes.push_back({offset, offset + bytes});
    for (uint32_t chunk = offset / CHUNK; chunk * CHUNK < offset + bytes; chunk++) {
        if (!check_async_readers(thread, chunk, verb)) return;
        for (uint32_t cell = chunk * CHUNK / CELL; cell < (chunk + 1) * CHUNK / CELL; cell++) {
            if (!check_async_read(thread, cell, verb) || !check_readers(thread, cell, 15, verb)) return;
            writes[cell] = mine;
            reads[2 * cell] = reads[2 * cell + 1] = {};
            more_reads[cell] = 0;
        }
        box_of[chunk] = uint32_t(boxes.size());
    }
}

void Races::store_box(int thread, uint32_t offset, int bytes, int reader, uint32_t group) {
    for (uint32_t chunk = offset / CHUNK; chunk * CHUNK < offset + bytes; chunk++) {
        for (uint32_t cell = chunk * CHUNK / CELL; cell < (chunk + 1) * CHUNK / CELL; cell++)
            if (!check_async_read(thread, cell, "has the copy engine read")) return;
        async_reads[chunk * READERS + reader - num_threads - BARRIERS] = group;
    }
}

bool Races::read_operand(int first_thread, uint32_t start, uint32_t offset, bool may_overread, int reader, uint32_t group) {
    uint32_t home = box_of[start / CHUNK];
    bool is_beyond = may_overread && home && (offset < boxes[home - 1].begin || offset >= boxes[home - 1].end);
    uint32_t chunk = offset / CHUNK;
    for (int lane = 0; lane < 32; lane++) {
        int thread = first_thread + lane;
        if (lane && bases[thread] == bases[thread - 1]) continue;  // it knows the same
        for (uint32_t cell = chunk * CHUNK / CELL; cell < (chunk + 1) * CHUNK / CELL; cell++)
            if (writes[cell] != fine[thread] && !check_async_read(thread, cell, "multiplies", is_beyond)) return false;
    }
    if (!is_beyond) async_reads[chunk * READERS + reader - num_threads - BARRIERS] = group;
    return true;
}

}  // namespace nemo::emulated
