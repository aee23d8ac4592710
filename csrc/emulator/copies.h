// Asynchronous copies into shared memory, and the barriers there on which they complete.
//
// Errors: a barrier that was not initialised, that a tensor copy uses before a barrier_init_fence, or with more
// arrivals than it counts; addresses and strides that are not aligned; tensor copies under way at the end of the block.

#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "emulator/races.h"
#include "emulator/tensor_map.h"

namespace resnet_fused::emulator {

class Copies {
  public:
    void reset(unsigned threads);

    // [mbarrier]
    void init(std::uint32_t barrier, int count);
    void init_fence();
    void expect(std::uint32_t barrier, std::uint32_t bytes);
    void arrive(std::uint32_t barrier);
    void wait(std::uint32_t barrier, std::uint32_t parity);

    // [cp.async]
    void copy(std::uint32_t to, const void* from, bool valid);
    void commit();
    void wait_groups(unsigned left);
    void arrive_after(std::uint32_t barrier);

    // [cp.async.bulk.tensor]
    void load(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int rank,
              const Coordinates& coordinates);

    // In lazy mode: completes something that a thread waits for; false if there is nothing.
    bool advance();

    void check_done() const;
    std::string awaited(unsigned thread) const;  // " for ..." where it waits for a barrier
    std::string under_way() const;

  private:
    struct Barrier {
        int count;
        int missing;  // arrivals until the phase ends
        unsigned initialiser;
        std::int64_t bytes = 0;   // expected and not yet there
        std::uint32_t phase = 0;  // phases that have ended
        bool fenced = false;
        std::vector<unsigned> waiters;
        Clocks arrived;  // in this phase
        Clocks ended;    // in those before
    };
    struct Copy {
        std::uint32_t to;
        const void* from;
        bool valid;
    };
    struct Thread {
        std::deque<Copy> queue;            // not yet done, oldest first
        std::uint64_t done = 0;            // copies
        std::deque<std::uint64_t> groups;  // `done` at the end of each
        std::uint32_t barrier = 0;         // that it waits for
        std::uint32_t parity = 0;
    };
    // Completes on a barrier: a tensor copy, or an arrival once the thread's copies so far are done.
    struct Pending {
        unsigned thread;
        std::uint32_t barrier;
        std::uint64_t copies = 0;
        bool tensor = false;
        TiledMap map{};
        std::uint32_t to = 0;
        Coordinates coordinates{};
    };

    Barrier& at(std::uint32_t barrier);
    void arrive(std::uint32_t barrier, unsigned thread);
    void settle(Barrier& barrier);
    void run(const Copy& copy, unsigned thread);
    void run_until(unsigned thread, std::uint64_t copies);
    void complete(const Pending& pending);

    std::map<std::uint32_t, Barrier> barriers_;
    std::vector<Thread> threads_;
    std::vector<Pending> pending_;
};

}  // namespace resnet_fused::emulator
