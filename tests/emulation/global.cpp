// Stamps of stores to global memory, and what atomics publish.
#include "emulation/global.h"

#include <algorithm>

#include "common/check.h"

namespace nemo::emulated {

void Global::reset() {
    pages.clear();
    published.clear();
    fences.clear();
    recent.fill({});
}

Global::Page* Global::page_of(uintptr_t number, bool is_made) {
    Entry& entry = recent[number % recent.size()];
    if (entry.number != number || (is_made && !entry.page)) {
        auto found = pages.find(number);
        if (found == pages.end() && is_made) found = pages.emplace(number, std::make_unique<Page>()).first;
        entry = {number, found == pages.end() ? nullptr : found->second.get()};
    }
    return entry.page;
}

bool Global::knows(const Races& races, const Foreign& foreign, uint32_t block, int thread, const Stamp& stamp) {
    if (stamp.block == block) return races.knows(thread, stamp.thread, stamp.value);
    for (const auto& event : foreign.acquired) {
        if (!races.knows(thread, event.thread, event.epoch)) continue;
        auto found = event.what->find(stamp.block);
        if (found != event.what->end() && (*found->second)[stamp.thread] >= stamp.value) return true;
    }
    return false;
}

void Global::access(Races& races, const Foreign& foreign, uint32_t block, int thread, const void* address, int bytes, bool is_write,
                    bool is_atomic) {
    auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
    if (!is_write && pages.empty()) return;
    for (uintptr_t cell = begin / CELL; cell * CELL < end; cell++) {
        Page* page = page_of(cell * CELL / PAGE, is_write);
        if (!page) continue;
        Stamp& before = (*page)[cell % (PAGE / CELL)];
        uintptr_t from = std::max(begin, cell * CELL) - cell * CELL, to = std::min(end - cell * CELL, uintptr_t(CELL));
        Stamp mine{block, races.epoch(thread), uint16_t(thread), uint8_t((1u << to) - (1u << from)), is_atomic};
        if (before.mask & mine.mask && !(before.is_atomic && is_atomic) && !knows(races, foreign, block, thread, before)) {
            races.report(text("race in global memory: thread ", thread, is_atomic ? " changes by an atomic " : is_write ? " writes " : " reads ",
                              address, ", which thread ", before.thread, " of block number ", before.block, " has written",
                              before.is_atomic ? " by an atomic" : "", ", and no release and acquire order the two"));
            return;
        }
        if (is_write) before = mine;
    }
}

void Global::copy(Races& races, const Foreign& foreign, uint32_t block, int thread, const void* address, int64_t bytes) {
    auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
    if (pages.empty()) return;
    for (uintptr_t cell = begin / CELL; cell * CELL < end; cell++) {
        Page* page = page_of(cell * CELL / PAGE, false);
        Stamp before = page ? (*page)[cell % (PAGE / CELL)] : Stamp{};
        if (!before.mask) continue;
        bool is_ordered = knows(races, foreign, block, thread, before);
        const auto& epochs = fences[{before.block, before.thread}];
        auto fence = std::lower_bound(epochs.begin(), epochs.end(), before.value);
        if (is_ordered && fence != epochs.end()) {
            before.value = *fence;
            if (knows(races, foreign, block, thread, before)) continue;
        }
        races.report(text("race in global memory: thread ", thread, " has the copy engine read ", address, ", which thread ",
                          before.thread, " of block number ", before.block, " has written",
                          is_ordered ? " without a fence_async_proxy_global" : ", and no release and acquire order the two"));
        return;
    }
}

void Global::add(Published& to, const Published& more) {
    for (const auto& [block, clock] : more) {
        Clock& mine = to[block];
        if (!mine || mine == clock) {
            mine = clock;
            continue;
        }
        auto both = std::make_shared<std::vector<uint32_t>>(*mine);
        for (size_t i = 0; i < both->size(); i++) (*both)[i] = std::max((*both)[i], (*clock)[i]);
        mine = both;
    }
}

std::shared_ptr<const Published> Global::known_to(const Races& races, const Foreign& foreign, uint32_t block, int thread) const {
    auto all = std::make_shared<Published>();
    for (const auto& event : foreign.acquired)
        if (races.knows(thread, event.thread, event.epoch)) add(*all, *event.what);
    add(*all, {{block, races.clock_of(thread)}});
    return all;
}

void Global::release(Races& races, Foreign& foreign, uint32_t block, int thread, const void* address) {
    auto all = std::make_shared<Published>(*known_to(races, foreign, block, thread));
    if (auto before = published[address]) add(*all, *before);
    published[address] = all;
    races.advance(thread);
}

void Global::acquire(Races& races, Foreign& foreign, int thread, const void* address) {
    auto found = published.find(address);
    if (found == published.end()) return;
    foreign.acquired.push_back({thread, races.advance(thread), found->second});
}

void Global::relaxed(Foreign& foreign, int thread, const void* address) {
    if (auto found = published.find(address); found != published.end()) foreign.observed[thread].push_back(found->second);
    if (auto mine = foreign.fenced.find(thread); mine != foreign.fenced.end()) {
        auto all = std::make_shared<Published>(*mine->second);
        if (auto before = published[address]) add(*all, *before);
        published[address] = all;
    }
}

void Global::fence(Races& races, Foreign& foreign, uint32_t block, int thread) {
    for (auto& one : foreign.observed[thread]) foreign.acquired.push_back({thread, races.advance(thread), one});
    foreign.observed[thread].clear();
    foreign.fenced[thread] = known_to(races, foreign, block, thread);
    races.advance(thread);
}

void Global::fence_async_proxy(Races& races, uint32_t block, int thread) {
    fences[{block, thread}].push_back(races.epoch(thread));
    races.advance(thread);
}

}  // namespace nemo::emulated
