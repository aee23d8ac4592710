// Kernels that are wrong in how their threads meet and in how they use shared memory: what the emulator must say of
// each.

#include "emulator/wrong_kernels.h"

namespace resnet_fused {

namespace {

using testing::base;
using testing::expect;
using testing::gives;
using testing::kShared;
using testing::kWarp;
using testing::Params;

// ---- collective functions

void diverge(Params) {
    std::uint32_t r[4];
    if (threadIdx.x % kWarp < 16) {
        ldmatrix_x4(r, base());
    } else {
        shuffle_xor(1.0f, 1);
    }
}

void diverge_in_arguments(Params) {
    named_barrier_sync(1 + static_cast<int>(threadIdx.x % 2), kWarp);
}

void leave_early(Params) {
    if (threadIdx.x == 5) return;
    warp_sync();
}

void wait_without_end(Params) {
    if (threadIdx.x / kWarp != 1) block_sync();
}

void count_half_warps(Params) {
    named_barrier_sync(1, kWarp / 2);
}

// ---- shared memory

void pass_the_end(Params) {
    store_shared_float(base() + kShared, 0.0f);
}

void below_the_start(Params) {
    load_shared16(0);
}

void misaligned(Params) {
    std::uint32_t r[4];
    ldmatrix_x4(r, base() + threadIdx.x * 16 + (threadIdx.x == 9 ? 8 : 0));
}

void misaligned_copy(Params p) {
    cp_async16(base() + threadIdx.x * 16, p.ones + 1, true);
}

// Warp 1 reads what warp 0 stored; value 1: with the block_sync.
void read_too_early(Params p) {
    if (threadIdx.x < kWarp) store_shared16(base() + threadIdx.x * 16, uint4{});
    if (p.value == 1) block_sync();
    std::uint32_t r[4];
    if (threadIdx.x >= kWarp) ldmatrix_x4(r, base() + threadIdx.x % kWarp * 16);
}

void overwrite_too_early(Params p) {
    store_shared_float(base() + threadIdx.x * 4, 1.0f);
    block_sync();
    for (int i = 0; i < 2; ++i) {
        const float other = load_shared_float(base() + (threadIdx.x + kWarp) % blockDim.x * 4);
        if (p.value == 1) block_sync();
        store_shared_float(base() + threadIdx.x * 4, other);
        block_sync();
    }
}

// Lane 0 speaks for its warp, whose other lanes it has not met; value 1: it has.
void release_for_others(Params p) {
    const std::uint32_t barrier = base() + 1024;
    if (threadIdx.x == 0) barrier_init(barrier, 1);
    block_sync();
    if (threadIdx.x < kWarp) {
        load_shared_float(base() + threadIdx.x * 4);
        if (p.value == 1) warp_sync();
        if (threadIdx.x == 0) barrier_arrive(barrier);
    } else {
        barrier_wait(barrier, 0);
        store_shared_float(base() + threadIdx.x % kWarp * 4, 1.0f);
    }
}

void store_over_barrier(Params) {
    if (threadIdx.x != 0) return;
    barrier_init(base(), 1);
    store_shared_float(base() + 4, 0.0f);
}

void use_barriers(Params) {
    if (threadIdx.x == 0) barrier_init(base(), 1);
}

// ---- tests

void test_collectives() {
    gives("lanes at different functions", "other threads of the warp are in", diverge, kWarp);
    gives("lanes at different barriers", "with other arguments", diverge_in_arguments, kWarp);
    gives("a lane that leaves", "exit", leave_early, kWarp);
    gives("a warp that does not come", "threads 0-31 wait in block_sync; threads 32-63 have exited; threads 64-95 wait",
          wait_without_end, 3 * kWarp);
    gives("half a warp", "expected whole warps", count_half_warps, kWarp);
    gives("threads that are no warp", "expected whole warps", leave_early, kWarp + 1);
}

void test_shared_memory() {
    gives("past the end", "4 bytes at offset 32768 are outside of the block's 32768", pass_the_end, kWarp);
    gives("below the start", "outside", below_the_start, kWarp);
    gives("ldmatrix", "not a multiple of 16", misaligned, kWarp);
    gives("cp_async16", "a global address that is not a multiple of 16", misaligned_copy, kWarp);
    gives("a read without block_sync", "a race", read_too_early, 2 * kWarp);
    gives("a read with block_sync", "0.0", read_too_early, 2 * kWarp, 1);
    gives("a store without block_sync", "a race", overwrite_too_early, 2 * kWarp);
    gives("a store with block_sync", "0.0", overwrite_too_early, 2 * kWarp, 1);
    gives("a release for others", "a race", release_for_others, 2 * kWarp);
    gives("a release for others that it met", "0.0", release_for_others, 2 * kWarp, 1);
    gives("a store over a barrier", "a store over a barrier", store_over_barrier, kWarp);
}

void test_devices() {
    emulator::settings().capability = 80;
    const std::string got = [] {
        try {
            launch(use_barriers, 1, kWarp, kShared, nullptr, Params{});
        } catch (const emulator::Error& error) {
            return std::string(error.what());
        }
        return std::string();
    }();
    expect(got == "barrier_init, block 0, thread 0: needs sm_90a, the device has 80", "another device: " + got);
    expect(capability(0) == 80 && multiprocessors(0) == 3 && shared_limit(0) == 227 * 1024, "what the device has");
    emulator::settings() = {};
    const std::string large = [] {
        try {
            launch(use_barriers, 1, kWarp, 228 * 1024, nullptr, Params{});
        } catch (const emulator::Error& error) {
            return std::string(error.what());
        }
        return std::string();
    }();
    expect(large.find("233472 bytes of shared memory") != std::string::npos, "too much shared memory: " + large);
}

}  // namespace

}  // namespace resnet_fused

int main() {
    using namespace resnet_fused;
    test_collectives();
    test_shared_memory();
    test_devices();
    return testing::report("errors");
}
