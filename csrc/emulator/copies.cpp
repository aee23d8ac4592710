#include "emulator/copies.h"

#include <cstring>
#include <utility>

#include "emulator/block.h"

namespace resnet_fused::emulator {

namespace {

constexpr std::uint32_t kCopyBytes = 16;
constexpr std::int64_t kMostBytes = (1 << 20) - 1;  // that a barrier can expect at a time
constexpr int kMostArrivals = (1 << 20) - 1;

bool lazy() {
    return settings().mode == Mode::lazy;
}

std::string named(std::uint32_t barrier) {
    return "the barrier at offset " + std::to_string(static_cast<std::int64_t>(barrier) - kWindow);
}

}  // namespace

void Copies::reset(unsigned threads) {
    barriers_.clear();
    threads_.assign(threads, Thread());
    pending_.clear();
}

Copies::Barrier& Copies::at(std::uint32_t barrier) {
    const auto found = barriers_.find(barrier);
    if (found == barriers_.end()) fail(named(barrier) + " was not initialised");
    return found->second;
}

void Copies::init(std::uint32_t barrier, int count) {
    if (count < 1 || count > kMostArrivals) fail("a count of " + std::to_string(count));
    block().shared.reserve(barrier);
    if (!barriers_.emplace(barrier, Barrier{count, count, block().thread(), 0, 0, false, {}, {}, {}}).second) {
        fail(named(barrier) + " was initialised before");
    }
}

void Copies::init_fence() {
    for (auto& [address, barrier] : barriers_) {
        if (barrier.initialiser == block().thread()) barrier.fenced = true;
    }
}

void Copies::settle(Barrier& barrier) {
    if (barrier.missing != 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.count;
    ++barrier.phase;
    join(barrier.ended, barrier.arrived);
    barrier.arrived.clear();
    for (const unsigned thread : barrier.waiters) {
        block().wake(thread);
    }
    barrier.waiters.clear();
}

void Copies::arrive(std::uint32_t barrier) {
    arrive(barrier, block().thread());
}

void Copies::arrive(std::uint32_t barrier, unsigned thread) {
    Barrier& at_barrier = at(barrier);
    if (at_barrier.missing == 0) fail("more arrivals than the count of " + named(barrier));
    --at_barrier.missing;
    block().shared.races.release(thread, at_barrier.arrived);
    settle(at_barrier);
}

void Copies::expect(std::uint32_t barrier, std::uint32_t bytes) {
    Barrier& at_barrier = at(barrier);
    at_barrier.bytes += bytes;
    if (at_barrier.bytes > kMostBytes) fail("more bytes than " + named(barrier) + " can expect");
}

void Copies::wait(std::uint32_t barrier, std::uint32_t parity) {
    if (parity > 1) fail("a parity of " + std::to_string(parity));
    Barrier& at_barrier = at(barrier);
    Thread& self = threads_[block().thread()];
    while (at_barrier.phase % 2 == parity) {
        at_barrier.waiters.push_back(block().thread());
        self.barrier = barrier;
        self.parity = parity;
        block().suspend();
        self.barrier = 0;
    }
    block().shared.races.acquire(block().thread(), at_barrier.ended);
}

void Copies::run(const Copy& copy, unsigned thread) {
    unsigned char* const to = block().shared.write(copy.to, kCopyBytes, thread);
    if (copy.valid) {
        std::memcpy(to, copy.from, kCopyBytes);
    } else {
        std::memset(to, 0, kCopyBytes);
    }
}

void Copies::run_until(unsigned thread, std::uint64_t copies) {
    Thread& self = threads_[thread];
    while (self.done < copies) {
        run(self.queue.front(), thread);
        self.queue.pop_front();
        ++self.done;
    }
}

void Copies::copy(std::uint32_t to, const void* from, bool valid) {
    if (reinterpret_cast<std::uintptr_t>(from) % kCopyBytes != 0) fail("a global address that is not a multiple of 16");
    block().shared.check(to, kCopyBytes);
    Thread& self = threads_[block().thread()];
    self.queue.push_back({to, from, valid});
    if (!lazy()) run_until(block().thread(), self.done + 1);
}

void Copies::commit() {
    Thread& self = threads_[block().thread()];
    self.groups.push_back(self.done + self.queue.size());
}

void Copies::wait_groups(unsigned left) {
    Thread& self = threads_[block().thread()];
    while (self.groups.size() > left) {
        run_until(block().thread(), self.groups.front());
        self.groups.pop_front();
    }
}

void Copies::arrive_after(std::uint32_t barrier) {
    const Thread& self = threads_[block().thread()];
    at(barrier);
    pending_.push_back({block().thread(), barrier, self.done + self.queue.size(), false, {}, 0, {}});
    if (!lazy()) {
        complete(pending_.back());
        pending_.pop_back();
    }
}

void Copies::load(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int rank,
                  const Coordinates& coordinates) {
    const TiledMap& tiled = tiled_map(map);
    if (tiled.rank != rank) fail("a tensor map of rank " + std::to_string(tiled.rank));
    if (to % kRowBytes != 0) fail("a shared address that is not a multiple of 128");
    block().shared.check(to, kCopyBytes);
    block().shared.check(to + static_cast<std::uint32_t>(tiled.rows() * kRowBytes) - kCopyBytes, kCopyBytes);
    if (!at(barrier).fenced) fail("no barrier_init_fence after the initialisation of " + named(barrier));
    pending_.push_back({block().thread(), barrier, 0, true, tiled, to, coordinates});
    if (!lazy()) {
        complete(pending_.back());
        pending_.pop_back();
    }
}

void Copies::complete(const Pending& pending) {
    if (!pending.tensor) {
        run_until(pending.thread, pending.copies);
        arrive(pending.barrier, pending.thread);
        return;
    }
    constexpr int kChunks = kRowBytes / kCopyBytes;
    for (int row = 0; row < pending.map.rows(); ++row) {
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const auto offset = static_cast<std::uint32_t>(row * kRowBytes + chunk * static_cast<int>(kCopyBytes));
            unsigned char* const to = block().shared.write_async(swizzled(pending.to + offset), pending.thread);
            read_box(pending.map, pending.coordinates, row, chunk, to);
        }
    }
    Barrier& barrier = at(pending.barrier);
    block().shared.races.release(pending.thread, barrier.arrived);
    barrier.bytes -= pending.map.rows() * kRowBytes;
    settle(barrier);
}

bool Copies::advance() {
    std::vector<std::size_t> awaited;
    for (std::size_t i = 0; i < pending_.size(); ++i) {
        if (!at(pending_[i].barrier).waiters.empty()) awaited.push_back(i);
    }
    if (awaited.empty()) return false;
    const std::size_t chosen = awaited[block().random().below(awaited.size())];
    const Pending pending = pending_[chosen];
    pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(chosen));
    complete(pending);
    return true;
}

void Copies::check_done() const {
    for (const Pending& pending : pending_) {
        if (pending.tensor) fail("a tensor copy is under way to " + named(pending.barrier));
    }
}

std::string Copies::awaited(unsigned thread) const {
    const Thread& self = threads_[thread];
    if (self.barrier == 0) return {};
    const Barrier& barrier = barriers_.at(self.barrier);
    return " for parity " + std::to_string(self.parity) + " of " + named(self.barrier) + ", in phase " +
           std::to_string(barrier.phase) + ", where " + std::to_string(barrier.missing) + " of " +
           std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
}

std::string Copies::under_way() const {
    std::string text;
    for (const Pending& pending : pending_) {
        text += "; under way: " + std::string(pending.tensor ? "a tensor copy" : "an arrival") + " of thread " +
                std::to_string(pending.thread) + " to " + named(pending.barrier);
    }
    return text;
}

}  // namespace resnet_fused::emulator
