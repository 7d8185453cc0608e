// What a launch moves: bytes of global memory as the blocks ask L2 for them and each once, sectors that the accesses of warps
// touch, and wavefronts of shared memory. Off unless a test asks for it.
#pragma once

#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nemo::emulated {

struct Counts {
    int64_t copied = 0;  // bytes that the copy engine and cp.async read, again for each copy; of a multicast once
    int64_t read = 0, written = 0;  // those too, and what ordinary accesses move: of a warp's access each byte once
    int64_t read_distinct = 0, written_distinct = 0;  // of the whole launch, each byte once
    int64_t accesses = 0, sectors = 0;  // ordinary accesses of warps to global memory, and the 32 bytes that they touch
    int64_t shared_accesses = 0, wavefronts = 0;  // of warps to shared memory, and the turns of its 32 banks that they take
};

// Lanes of a warp access together what they access at the same place of the code for the same time.
class Counter {
  public:
    bool is_on = false;
    Counts counts;

    void reset();
    void copy(const void* address, int64_t bytes, bool is_write);
    // Of one lane. `code`: where in the program.
    void access(uint32_t block, int thread, const void* code, const void* address, int bytes, bool is_write);
    void access_shared(uint32_t block, int thread, const void* code, uint32_t offset, int bytes);
    void end_block(uint32_t block);

  private:
    static constexpr int PAGE = 4096;
    struct Seen {
        std::unordered_map<uintptr_t, std::unique_ptr<std::bitset<PAGE>>> pages;
        int64_t add(uintptr_t begin, uintptr_t end);  // bytes that are new
    };
    struct Group {
        bool is_shared = false, is_write = false;
        int bytes = 0;
        std::vector<std::pair<int, uintptr_t>> lanes;  // and addresses
    };
    struct Place {  // an instruction of a warp
        int turns[32] = {};
        std::vector<Group> groups;  // by turn
    };
    Seen read, written;
    std::map<uint32_t, std::map<std::pair<const void*, int>, Place>> places;  // by block, then code and warp

    void touch(uintptr_t begin, int64_t bytes, bool is_write);
    Group& group_of(uint32_t block, int thread, const void* code);
    void judge(const Group& group);
};

}  // namespace nemo::emulated
