#include "emulator/races.h"

#include <algorithm>
#include <string>

#include "emulator/block.h"

namespace resnet_fused::emulator {

void join(Clocks& clocks, const Clocks& to) {
    if (clocks.empty()) {
        clocks = to;
        return;
    }
    for (std::size_t i = 0; i < to.size(); ++i) {
        clocks[i] = std::max(clocks[i], to[i]);
    }
}

// What is known of earlier blocks stays, in memory that only grows: all of it is ordered before what comes.
void Races::reset(std::size_t bytes, unsigned threads) {
    constexpr std::uint32_t kMany = 1u << 31;
    if (std::any_of(counts_.begin(), counts_.end(), [](std::uint32_t count) { return count > kMany; })) *this = Races();
    const unsigned warps = threads / kLanes;
    writes_.resize(std::max(writes_.size(), (bytes + kGrain - 1) / kGrain));
    reads_.resize(std::max<std::size_t>(reads_.size(), warps));
    for (std::vector<Access>& reads : reads_) {
        reads.resize(writes_.size());
    }
    counts_.resize(std::max<std::size_t>(counts_.size(), threads), 1);
    warps_.assign(warps, counts_);
    threads_.assign(threads, Clocks());
    for (std::uint32_t& count : counts_) {
        ++count;
    }
}

bool Races::knows(unsigned thread, const Access& access) const {
    if (access.thread == thread) return true;
    const Clocks& known = threads_[thread].empty() ? warps_[thread / kLanes] : threads_[thread];
    return known[access.thread] >= access.count;
}

// An Error unless all accesses to these grains are ordered before what `thread` does there now.
void Races::check(const std::vector<Access>& accesses, Grains grains, unsigned thread, const char* does,
                  const char* did) const {
    Access known;  // neighbours mostly have the same last access
    for (std::size_t grain = grains.begin; grain < grains.end; ++grain) {
        const Access& access = accesses[grain];
        if (access.count == known.count && access.thread == known.thread) continue;
        if (!knows(thread, access)) {
            fail("a race: thread " + std::to_string(thread) + does + "what thread " + std::to_string(access.thread) +
                 did + "at offset " + std::to_string(grain * kGrain) + ", and nothing orders the two");
        }
        known = access;
    }
}

void Races::read(std::size_t offset, std::size_t bytes, unsigned thread) {
    const Grains grains{offset / kGrain, (offset + bytes) / kGrain};
    check(writes_, grains, thread, " reads ", " wrote ");
    std::vector<Access>& reads = reads_[thread / kLanes];
    for (std::size_t grain = grains.begin; grain < grains.end; ++grain) {
        reads[grain] = {counts_[thread], thread};
    }
}

void Races::write(std::size_t offset, std::size_t bytes, unsigned thread) {
    const Grains grains{offset / kGrain, (offset + bytes) / kGrain};
    check(writes_, grains, thread, " writes ", " wrote ");
    for (std::size_t warp = 0; warp < warps_.size(); ++warp) {
        check(reads_[warp], grains, thread, " writes ", " read ");
    }
    for (std::size_t grain = grains.begin; grain < grains.end; ++grain) {
        writes_[grain] = {counts_[thread], thread};
    }
}

void Races::meet(unsigned warp) {
    Clocks& common = warps_[warp];
    for (unsigned thread = warp * kLanes; thread < (warp + 1) * kLanes; ++thread) {
        if (!threads_[thread].empty()) {
            join(common, threads_[thread]);
            threads_[thread].clear();
        }
    }
    for (unsigned thread = warp * kLanes; thread < (warp + 1) * kLanes; ++thread) {
        common[thread] = counts_[thread]++;
    }
}

void Races::meet(const std::vector<unsigned>& warps) {
    Clocks common;
    for (const unsigned warp : warps) {
        meet(warp);
        join(common, warps_[warp]);
    }
    for (const unsigned warp : warps) {
        warps_[warp] = common;
    }
}

void Races::release(unsigned thread, Clocks& clocks) {
    join(clocks, threads_[thread].empty() ? warps_[thread / kLanes] : threads_[thread]);
    clocks[thread] = counts_[thread]++;
}

void Races::acquire(unsigned thread, const Clocks& clocks) {
    if (threads_[thread].empty()) threads_[thread] = warps_[thread / kLanes];
    join(threads_[thread], clocks);
}

}  // namespace resnet_fused::emulator
