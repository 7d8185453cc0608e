// What happens before what in a block: a clock per thread, who last wrote and read each part of shared memory, and whether
// an access is ordered after those that it must not overlap. Deterministic: nothing here depends on when threads ran.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace nemo::emulated {

// What is known to have happened: of each slot, how far. Slots are threads, then mbarriers (phases that are complete),
// then readers of the async proxy: warps (groups of wgmma that are done) and threads (groups of stores that have been read).
using Clock = std::shared_ptr<const std::vector<uint32_t>>;

enum class Kind : uint8_t { NONE, PLAIN, ATOMIC, COPY, ASYNC };  // COPY: cp.async that its thread has not waited for

struct Stamp {  // of an access: it is known to those whose clock of `slot` has reached `value`
    uint32_t value = 0;
    uint16_t slot = 0;
    uint8_t mask = 0;  // bytes of the cell
    Kind kind = Kind::NONE;
    bool operator==(const Stamp&) const = default;
};

class Races {
  public:
    static constexpr int CELL = 4, CHUNK = 16, BARRIERS = 64, READERS = 16;  // bytes; slots

    std::function<void(const std::string&)> report;

    void reset(int threads, int shared_bytes);
    // A thread of another block, which knows so much of this one: the number by which it is named here until the next call.
    int admit(const Clock& clock) {
        bases[num_slots] = clock;
        fine[num_slots] = {};
        return num_slots;
    }
    Clock nothing() const { return std::make_shared<const std::vector<uint32_t>>(num_slots, 0); }

    // ---- order
    bool knows(int thread, int slot, uint32_t value) const {
        return (slot == thread ? epochs[thread] : (*bases[thread])[slot]) >= value;
    }
    Clock clock_of(int thread) const;
    uint32_t epoch(int thread) const { return epochs[thread]; }
    uint32_t advance(int thread) { return ++epochs[thread]; }  // what came before it is told from what comes after
    void release(int thread, std::vector<uint32_t>& into);     // adds what it knows, and goes on
    void acquire(int thread, const Clock& clock);
    void learn(int thread, int slot, uint32_t value);
    void meet(const std::vector<int>& threads, const std::vector<uint32_t>& others);  // all know what any knows
    void fence(int thread);  // its writes may be read by the async proxy
    int new_barrier();       // slots
    int new_reader();

    // ---- accesses of shared memory, by offset
    void access(int thread, uint32_t offset, int bytes, bool is_write, bool is_atomic = false);
    void look(int thread, uint32_t offset, int bytes);  // at what was written once and for all
    void start_copy(int thread, uint32_t offset);  // cp.async, of CHUNK bytes
    void finish_copy(uint32_t offset, const Stamp& stamp);
    void finish_own_copy(int thread, uint32_t offset);  // that the thread has waited for
    void load_box(int thread, uint32_t offset, int bytes, int barrier, uint32_t phase);
    void store_box(int thread, uint32_t offset, int bytes, int reader, uint32_t group);
    // Of wgmma, one chunk of an operand whose first chunk lies at `start`. Whether its bytes are certain: beyond the box
    // that the operand begins in they may be on their way, as long as nobody uses the product.
    bool read_operand(int first_thread, uint32_t start, uint32_t offset, bool may_overread, int reader, uint32_t group);

  private:
    struct Box {
        uint32_t begin, end;
    };
    int num_threads = 0, num_slots = 0, num_barriers = 0, num_readers = 0;
    std::vector<uint32_t> epochs;
    std::vector<Clock> bases;
    std::vector<std::vector<uint32_t>> fences;  // by thread: epochs, ascending
    std::vector<Stamp> writes, reads;           // by cell; two readers each
    std::vector<uint32_t> more_reads;           // by cell: 1 + index of what all threads read, or 0
    std::vector<std::vector<uint32_t>> crowds;  // epochs by thread
    std::vector<uint32_t> async_reads;          // by chunk and reader
    std::vector<uint32_t> box_of;               // by chunk: 1 + index of the box that wrote it last, or 0
    std::vector<Box> boxes;
    std::vector<Stamp> fine;  // by thread: what it has been found to know, and stays so

    // Many threads that know the same learn the same: they share what comes of it.
    struct Join {
        Clock base, other, joined;
    };
    struct {
        Clock base, more;
        int slot;
        uint32_t value;
    } last_lesson;
    std::array<Join, 16> joins;
    Clock join(const Clock& base, const Clock& other);

    std::string name(const Stamp& stamp) const;
    bool is_published(int thread, const Stamp& stamp) const;  // to the async proxy
    bool check_write(int thread, uint32_t cell, const Stamp& mine, const char* verb);
    bool check_readers(int thread, uint32_t cell, uint8_t mask, const char* verb);
    bool check_async_readers(int thread, uint32_t chunk, const char* verb);
    void note_read(int thread, uint32_t cell, uint8_t mask);
    bool check_async_read(int thread, uint32_t cell, const char* verb, bool is_quiet = false);
    void say(int thread, const char* verb, uint32_t cell, const std::string& what);
};

}  // namespace nemo::emulated
