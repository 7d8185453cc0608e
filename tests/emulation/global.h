// Global memory as the blocks of a launch share it: who last wrote each part of it, and what a block knows of the others.
// A plain access to what another block has written is a race unless an acquire has met the release that followed the write.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <unordered_map>

#include "emulation/races.h"

namespace nemo::emulated {

using Published = std::map<uint32_t, Clock>;  // by block

struct Acquired {  // by a thread at an epoch: who knows of that, knows what was published
    int thread;
    uint32_t epoch;
    std::shared_ptr<const Published> what;
};

// What one block knows of the others, and its threads' fences.
struct Foreign {
    std::vector<Acquired> acquired;
    std::map<int, std::shared_ptr<const Published>> fenced;                // by thread: what its later atomics publish
    std::map<int, std::vector<std::shared_ptr<const Published>>> observed;  // by thread: what its next fence acquires
};

class Global {
  public:
    void reset();
    void access(Races& races, const Foreign& foreign, uint32_t block, int thread, const void* address, int bytes, bool is_write,
                bool is_atomic);
    void release(Races& races, Foreign& foreign, uint32_t block, int thread, const void* address);
    void acquire(Races& races, Foreign& foreign, int thread, const void* address);
    void relaxed(Foreign& foreign, int thread, const void* address);  // an atomic: counts only beside fences
    void fence(Races& races, Foreign& foreign, uint32_t block, int thread);
    void fence_async_proxy(Races& races, uint32_t block, int thread);  // its writes may be read by the copy engine
    void copy(Races& races, const Foreign& foreign, uint32_t block, int thread, const void* address, int64_t bytes);  // which reads

  private:
    struct Stamp {
        uint32_t block = 0, value = 0;
        uint16_t thread = 0;
        uint8_t mask = 0;
        bool is_atomic = false;
    };
    static constexpr int CELL = 4, PAGE = 4096;
    using Page = std::array<Stamp, PAGE / CELL>;
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    struct Entry {
        uintptr_t number = ~uintptr_t(0);
        Page* page = nullptr;
    };
    std::array<Entry, 256> recent;
    std::map<const void*, std::shared_ptr<const Published>> published;
    std::map<std::pair<uint32_t, int>, std::vector<uint32_t>> fences;  // of the async proxy, by block and thread: epochs, ascending

    Page* page_of(uintptr_t number, bool is_made);
    std::shared_ptr<const Published> known_to(const Races& races, const Foreign& foreign, uint32_t block, int thread) const;
    static bool knows(const Races& races, const Foreign& foreign, uint32_t block, int thread, const Stamp& stamp);
    static void add(Published& to, const Published& more);
};

}  // namespace nemo::emulated
