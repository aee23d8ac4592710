// Finds accesses to shared memory that nothing orders, whatever the order in which this run happens to make them.
//
// A thread counts its releases; an access carries the count of its thread. A thread knows of every other up to which
// count its accesses come before: what it learns where they meet (a collective function, block_sync, a barrier in
// shared memory). A read after a write, or a write after a read or write, by a thread that does not know of it is an
// Error. [Lamport 1978, "Time, clocks, and the ordering of events in a distributed system"; PTX ISA: Memory Consistency
// Model] Of the reads by one warp the last alone is kept.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace resnet_fused::emulator {

// Of each thread, the count up to which something is ordered after it. Empty stands for zeros.
using Clocks = std::vector<std::uint32_t>;

void join(Clocks& clocks, const Clocks& to);

class Races {
  public:
    // A new block, ordered after the last.
    void reset(std::size_t bytes, unsigned threads);

    void read(std::size_t offset, std::size_t bytes, unsigned thread);
    void write(std::size_t offset, std::size_t bytes, unsigned thread);

    // All threads of these warps meet.
    void meet(unsigned warp);
    void meet(const std::vector<unsigned>& warps);

    // What comes later in whoever acquires `clocks` is ordered after what this thread did.
    void release(unsigned thread, Clocks& clocks);
    void acquire(unsigned thread, const Clocks& clocks);

  private:
    static constexpr std::size_t kGrain = 2;  // bytes

    struct Access {
        std::uint32_t count = 0;  // 0: none
        std::uint32_t thread = 0;
    };

    struct Grains {
        std::size_t begin;
        std::size_t end;
    };

    bool knows(unsigned thread, const Access& access) const;
    void check(const std::vector<Access>& accesses, Grains grains, unsigned thread, const char* does,
               const char* did) const;

    std::vector<Access> writes_;              // of each grain the last
    std::vector<std::vector<Access>> reads_;  // of each warp and grain the last
    Clocks counts_;                           // of each thread its own, from 1
    std::vector<Clocks> warps_;               // what all threads of a warp know
    std::vector<Clocks> threads_;             // what one knows, where that is more; else empty
};

}  // namespace resnet_fused::emulator
