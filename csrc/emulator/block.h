// One block of an emulated kernel: its threads as fibers, who runs next, and where threads meet.
//
// A thread runs until it must wait. The next is drawn from those that can go on: mostly of the same warp or mostly of
// another, which each block draws anew, so that over the seeds warps run in step as well as far ahead of each other.
// Errors: lanes of a warp at different collective functions, or some of them gone; threads that wait for ever.

#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/copies.h"
#include "emulator/emulator.h"
#include "emulator/fiber.h"
#include "emulator/products.h"
#include "emulator/random.h"
#include "emulator/shared.h"

namespace resnet_fused::emulator {

constexpr unsigned kLanes = 32;

// What each lane brings to a collective function; the meaning is the function's.
using Operands = std::array<void*, kLanes>;

class Block {
  public:
    void run(unsigned grid, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body);

    Shared shared;
    Copies copies;
    Products products;

    unsigned thread() const { return current_; }
    unsigned warp() const { return current_ / kLanes; }
    unsigned warps() const { return static_cast<unsigned>(warps_.size()); }
    Random& random() { return random_; }
    std::string where() const;

    // Names the function that the running thread is in, for errors.
    void enter(const char* function) { threads_[current_]->function = function; }

    // Calls `act(operands)` once, when all lanes of the warp are here with the same function and key.
    template <class Act>
    void collective(const char* function, std::uint64_t key, void* operand, Act act) {
        if (!gather(function, key, operand)) return;
        act(warps_[warp()].operands);
        shared.races.meet(warp());
        release(warp());
    }

    // Meets `count` threads, whole warps, at barrier `id`.
    void meet(const char* function, int id, unsigned count);

    // The running thread waits until somebody wakes it.
    void suspend();
    void wake(unsigned thread);

  private:
    struct Thread {
        explicit Thread(void (*entry)()) : fiber(entry) {}
        Fiber fiber;
        const char* function = "";
        bool exited = false;
    };
    struct Warp {
        const char* function = nullptr;
        std::uint64_t key = 0;
        Operands operands{};
        unsigned arrived = 0;  // lanes, as bits
        unsigned exited = 0;
    };
    struct Meeting {
        unsigned count = 0;  // threads that it waits for
        std::vector<unsigned> warps;
    };

    static void thread_main();
    void run_block(unsigned index);
    void leave();
    unsigned next();
    bool gather(const char* function, std::uint64_t key, void* operand);
    void release(unsigned warp);
    std::string waiting() const;

    std::vector<std::unique_ptr<Thread>> threads_;  // at least as many as a block has
    std::vector<Warp> warps_;
    std::vector<unsigned> ready_;  // of each warp the lanes that can go on, as bits
    unsigned ready_warps_ = 0;
    std::map<int, Meeting> meetings_;
    Fiber host_;
    unsigned count_ = 0;
    unsigned current_ = 0;
    unsigned left_ = 0;  // threads that have not exited
    unsigned stay_ = 0;  // of 65536, how often the next thread is of the same warp
    bool running_ = false;
    Random random_{0};
    const std::function<void()>* body_ = nullptr;
    std::exception_ptr error_;
};

// The block that runs.
extern Block the_block;
inline Block& block() {
    return the_block;
}

// Throws Error: where, and `what`.
[[noreturn]] void fail(const std::string& what);

}  // namespace resnet_fused::emulator
