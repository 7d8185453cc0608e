// Bytes, sectors and wavefronts.
#include "emulation/counts.h"

#include <algorithm>
#include <array>
#include <set>

namespace nemo::emulated {

void Counter::reset() {
    counts = {};
    read.pages.clear();
    written.pages.clear();
    places.clear();
}

int64_t Counter::Seen::add(uintptr_t begin, uintptr_t end) {
    int64_t added = 0;
    while (begin < end) {
        uintptr_t number = begin / PAGE, stop = std::min(end, (number + 1) * PAGE);
        auto& page = pages[number];
        if (!page) page = std::make_unique<std::bitset<PAGE>>();
        for (; begin < stop; begin++) {
            added += !page->test(begin % PAGE);
            page->set(begin % PAGE);
        }
    }
    return added;
}

void Counter::touch(uintptr_t begin, int64_t bytes, bool is_write) {
    (is_write ? counts.written_distinct : counts.read_distinct) += (is_write ? written : read).add(begin, begin + bytes);
}

void Counter::copy(const void* address, int64_t bytes, bool is_write) {
    if (!is_on) return;
    (is_write ? counts.written : counts.read) += bytes;
    if (!is_write) counts.copied += bytes;
    touch(reinterpret_cast<uintptr_t>(address), bytes, is_write);
}

Counter::Group& Counter::group_of(uint32_t block, int thread, const void* code) {
    Place& place = places[block][{code, thread / 32}];
    size_t turn = place.turns[thread % 32]++;
    if (turn >= place.groups.size()) place.groups.resize(turn + 1);
    return place.groups[turn];
}

void Counter::access(uint32_t block, int thread, const void* code, const void* address, int bytes, bool is_write) {
    if (!is_on) return;
    Group& group = group_of(block, thread, code);
    group.is_write = is_write;
    group.bytes = std::max(group.bytes, bytes);
    group.lanes.push_back({thread % 32, reinterpret_cast<uintptr_t>(address)});
    touch(reinterpret_cast<uintptr_t>(address), bytes, is_write);
}

void Counter::access_shared(uint32_t block, int thread, const void* code, uint32_t offset, int bytes) {
    if (!is_on) return;
    Group& group = group_of(block, thread, code);
    group.is_shared = true;
    group.bytes = std::max(group.bytes, bytes);
    group.lanes.push_back({thread % 32, offset});
}

void Counter::end_block(uint32_t block) {
    if (!is_on) return;
    for (auto& [where, place] : places[block])
        for (auto& group : place.groups) judge(group);
    places.erase(block);
}

void Counter::judge(const Group& group) {
    if (!group.is_shared) {
        std::set<uintptr_t> sectors, addresses;
        for (auto [lane, address] : group.lanes) {
            addresses.insert(address);
            for (uintptr_t sector = address / 32; sector * 32 < address + group.bytes; sector++) sectors.insert(sector);
        }
        (group.is_write ? counts.written : counts.read) += int64_t(addresses.size()) * group.bytes;
        counts.accesses++;
        counts.sectors += int64_t(sectors.size());
        return;
    }
    // 32 lanes of 4 bytes at once, 16 of 8, 8 of 16. Lanes that want the same word share it.
    int at_once = std::clamp(32 * 4 / std::max(group.bytes, 4), 8, 32);
    std::array<std::array<std::set<uintptr_t>, 32>, 4> words;
    for (auto [lane, address] : group.lanes)
        for (uintptr_t word = address / 4; word * 4 < address + group.bytes; word++) words[lane / at_once][word % 32].insert(word);
    counts.shared_accesses++;
    for (auto& banks : words) {
        size_t most = 0;
        for (auto& bank : banks) most = std::max(most, bank.size());
        counts.wavefronts += int64_t(most);
    }
}

}  // namespace nemo::emulated
