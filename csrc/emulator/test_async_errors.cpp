// Kernels that are wrong in what they do asynchronously: what the emulator must say of each.

#include "emulator/wrong_kernels.h"

namespace resnet_fused {

namespace {

using testing::base;
using testing::expect;
using testing::gives;
using testing::kGroup;
using testing::kSeeds;
using testing::kShared;
using testing::kWarp;
using testing::Params;
using testing::wrong_when_lazy;

// ---- asynchronous copies

void copy_without_wait(Params p) {
    cp_async16(base() + threadIdx.x * 16, p.ones + threadIdx.x * 4, true);
    cp_async_commit();
    if (p.value == 0) cp_async_wait<0>();
    const float got = load_shared_float(base() + threadIdx.x * 16);
    if (threadIdx.x == 7) *p.result = got;
}

void wait_for_the_wrong_group(Params p) {
    cp_async16(base() + threadIdx.x * 16, p.ones, true);
    cp_async_commit();
    cp_async16(base() + 1024 + threadIdx.x * 16, p.ones, true);
    cp_async_commit();
    if (p.value == 0) {
        cp_async_wait<0>();
    } else {
        cp_async_wait<1>();
    }
    const float got = load_shared_float(base() + 1024 + threadIdx.x * 16);
    if (threadIdx.x == 0) *p.result = got;
}

// ---- barriers and tensor copies. Thread 0 fetches; `value` names the mistake.

enum Mistake {
    kNone,
    kNoInit,
    kTwoInits,
    kNoInitFence,
    kExpectTooMuch,
    kNoWait,
    kNoArrival,
    kArriveTwice,
    kMisaligned,
    kOutside,
    kNoProxyFence,
    kRefill,
};

void fetch(Params p) {
    const auto mistake = static_cast<Mistake>(p.value);
    constexpr std::uint32_t kBytes = 64 * 128;
    const std::uint32_t box = base() + (mistake == kMisaligned ? 64 : mistake == kOutside ? kShared - kBytes + 128 : 0);
    const std::uint32_t barrier = base() + kBytes;
    if (mistake == kNoProxyFence) store_shared_float(base() + threadIdx.x * 4, 0.0f);
    if (threadIdx.x == 0) {
        if (mistake != kNoInit) barrier_init(barrier, 1);
        if (mistake == kTwoInits) barrier_init(barrier, 1);
        if (mistake != kNoInitFence) barrier_init_fence();
    }
    warp_sync();
    if (threadIdx.x == 0) {
        barrier_expect(barrier, mistake == kExpectTooMuch ? kBytes + 16 : kBytes);
        if (mistake == kArriveTwice) barrier_arrive(barrier);
        if (mistake != kNoArrival) barrier_arrive(barrier);
        tma_load_2d(box, &p.map, barrier, 0, 0);
    }
    if (mistake == kNoWait) return;
    barrier_wait(barrier, 0);
    warp_sync();
    const float got = load_shared_float(base() + threadIdx.x * 16);
    if (threadIdx.x == 0) *p.result = bit_cast<std::uint32_t>(got) == 0x3f803f80u ? 1.0f : 0.0f;
    if (threadIdx.x == 0 && mistake == kRefill) {  // while other lanes may still read
        barrier_arrive_expect(barrier, kBytes);
        tma_load_2d(box, &p.map, barrier, 0, 0);
    }
    if (mistake == kRefill) barrier_wait(barrier, 1);
}

// ---- wgmma: 64x64 of ones, k16; B by a tensor copy, A a word of two ones in each register

constexpr std::uint32_t kOnes = 0x3f803f80u;

void fetch_b(Params& p) {
    const std::uint32_t barrier = base() + 64 * 128;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_arrive_expect(barrier, 64 * 128);
        tma_load_2d(base(), &p.map, barrier, 0, 0);
    }
    block_sync();
    barrier_wait(barrier, 0);
}

std::uint64_t descriptor() {
    return matrix_descriptor(base(), 0, 1024);
}

void read_before_wait(Params p) {
    fetch_b(p);
    float d[8][4] = {};
    const std::uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes};
    wgmma_fence();
    wgmma<Bf16, 64, false>(d, a, descriptor());
    wgmma_commit();
    if (p.value == 0) wgmma_wait<0>();
    const float got = d[3][1];
    wgmma_wait<0>();
    if (threadIdx.x == 77) *p.result = got / 16;
}

void overwrite_registers(Params p) {
    fetch_b(p);
    float d[8][4] = {};
    std::uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes};
    wgmma_fence();
    wgmma<Bf16, 64, false>(d, a, descriptor());
    wgmma_commit();
    if (p.value == 0) wgmma_wait<0>();
    for (std::uint32_t& word : a) {
        word = 0;
    }
    wgmma_fence();
    wgmma<Bf16, 64, false>(d, a, descriptor());
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x == 0) *p.result = d[0][0] / 16;
}

// A warp is done, the others may still read what it overwrites; value 1: they have met.
void overwrite_b(Params p) {
    fetch_b(p);
    float d[8][4] = {};
    const std::uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes};
    wgmma_fence();
    wgmma<Bf16, 64, false>(d, a, descriptor());
    wgmma_commit();
    wgmma_wait<0>();
    if (p.value == 1) block_sync();
    store_shared_float(base() + threadIdx.x * 4, 0.0f);
}

enum ProductMistake {
    kNoFence,
    kNoEnd,
    kOneWarpFewer,
    kOtherDescriptor,
    kShifted,
    kWithinRow,
    kOddStride,
    kStoredB,
    kTooFewWarps,
};

void multiply_wrongly(Params p) {
    const auto mistake = static_cast<ProductMistake>(p.value);
    if (mistake != kStoredB) fetch_b(p);
    if (mistake == kStoredB) {
        for (std::uint32_t at = threadIdx.x * 16; at < 64 * 128; at += blockDim.x * 16) {
            store_shared16(base() + at, uint4{});
        }
        block_sync();
    }
    const unsigned warp = threadIdx.x / kWarp;
    if (mistake == kOneWarpFewer && warp == 2) return;
    float d[8][4] = {};
    const std::uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes};
    std::uint64_t b = descriptor();
    if (mistake == kOtherDescriptor && warp == 1) b += 2;
    if (mistake == kShifted) b += 128 >> 4;
    if (mistake == kWithinRow) b += 112 >> 4;
    if (mistake == kOddStride) b = matrix_descriptor(base(), 0, 1152);
    if (mistake != kNoFence) wgmma_fence();
    wgmma<Bf16, 64, false>(d, a, b);
    wgmma_commit();
    if (mistake != kNoEnd) wgmma_wait<0>();
}

// ---- tests

void test_copies() {
    wrong_when_lazy("no cp_async_wait", copy_without_wait, kWarp);
    wrong_when_lazy("cp_async_wait of another group", wait_for_the_wrong_group, kWarp);
    gives("a right fetch", "1.0", fetch, kWarp, kNone);
    gives("no barrier_init", "was not initialised", fetch, kWarp, kNoInit);
    gives("two barrier_init", "was initialised before", fetch, kWarp, kTwoInits);
    gives("no barrier_init_fence", "no barrier_init_fence", fetch, kWarp, kNoInitFence);
    gives("too many bytes expected", "deadlock in block 0: threads 0-31 wait in barrier_wait for parity 0", fetch,
          kWarp, kExpectTooMuch);
    gives("no arrival", "1 of 1 arrivals and", fetch, kWarp, kNoArrival);
    gives("one arrival too many", "more arrivals than the count", fetch, kWarp, kArriveTwice);
    gives("a misaligned box", "not a multiple of 128", fetch, kWarp, kMisaligned);
    gives("a box outside", "outside", fetch, kWarp, kOutside);
    gives("stores before a fetch", "no proxy_fence", fetch, kWarp, kNoProxyFence);
    gives("a fetch over what others read", "a race", fetch, kWarp, kRefill);
    testing::in_every_order(kSeeds, [] {
        const bool lazy = emulator::settings().mode == emulator::Mode::lazy;
        const std::string got = testing::Fixture().run(fetch, kWarp, kNoWait);
        expect((got.find("a tensor copy is under way") != std::string::npos) == lazy, "no barrier_wait: " + got);
    });
}

void test_products() {
    wrong_when_lazy("no wgmma_wait", read_before_wait, kGroup);
    wrong_when_lazy("registers of a product overwritten", overwrite_registers, kGroup);
    gives("shared memory of a product overwritten", "a race", overwrite_b, kGroup);
    gives("shared memory of a product overwritten later", "0.0", overwrite_b, kGroup, 1);
    gives("no wgmma_fence", "no wgmma_fence", multiply_wrongly, kGroup, kNoFence);
    gives("no wait at all", "are under way", multiply_wrongly, kGroup, kNoEnd);
    gives("a warp without the product", "fewer products than its warpgroup", multiply_wrongly, kGroup, kOneWarpFewer);
    gives("warps with different descriptors", "with different products", multiply_wrongly, kGroup, kOtherDescriptor);
    gives("a descriptor within the pattern", "within the swizzle's pattern", multiply_wrongly, kGroup, kShifted);
    gives("a descriptor at the end of a row", "beyond a row", multiply_wrongly, kGroup, kWithinRow);
    gives("a stride that breaks the pattern", "a stride", multiply_wrongly, kGroup, kOddStride);
    gives("B stored by threads", "no proxy_fence", multiply_wrongly, kGroup, kStoredB);
    gives("two warps", "less than 4 warps", multiply_wrongly, 2 * kWarp, kTooFewWarps);
}

}  // namespace

}  // namespace resnet_fused

int main() {
    using namespace resnet_fused;
    test_copies();
    test_products();
    return testing::report("asynchronous errors");
}
