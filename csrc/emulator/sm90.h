// The functions of common/sm90.h on the CPU; there stands what they do.

#pragma once

#include <cuda.h>

#include <cstdint>

#include "emulator/mma.h"

namespace resnet_fused {

namespace emulator {

// The block, for a function that sm_90a alone has.
Block& hopper(const char* function);

}  // namespace emulator

inline void barrier_init(std::uint32_t barrier, int count) {
    emulator::hopper("barrier_init").copies.init(barrier, count);
}

inline void barrier_init_fence() {
    emulator::hopper("barrier_init_fence").copies.init_fence();
}

inline void barrier_arrive(std::uint32_t barrier) {
    emulator::hopper("barrier_arrive").copies.arrive(barrier);
}

inline void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
    emulator::hopper("barrier_expect").copies.expect(barrier, bytes);
}

inline void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
    emulator::Copies& copies = emulator::hopper("barrier_arrive_expect").copies;
    copies.expect(barrier, bytes);
    copies.arrive(barrier);
}

inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
    emulator::hopper("barrier_wait").copies.wait(barrier, parity);
}

inline void cp_async_arrive(std::uint32_t barrier) {
    emulator::hopper("cp_async_arrive").copies.arrive_after(barrier);
}

inline void tma_load_2d(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int c0, int c1) {
    emulator::hopper("tma_load_2d").copies.load(to, map, barrier, 2, {c0, c1, 0});
}

inline void tma_load_3d(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int c0, int c1, int c2) {
    emulator::hopper("tma_load_3d").copies.load(to, map, barrier, 3, {c0, c1, c2});
}

inline void tma_prefetch(const CUtensorMap* map) {
    emulator::hopper("tma_prefetch");
    emulator::tiled_map(map);
}

inline void proxy_fence() {
    emulator::Block& block = emulator::hopper("proxy_fence");
    block.shared.proxy_fence(block.thread());
}

template <class... Registers>
void wgmma_fence(Registers&...) {
    emulator::hopper("wgmma_fence").products.fence();
}

inline void wgmma_commit() {
    emulator::hopper("wgmma_commit").products.commit();
}

template <int N, class... Registers>
void wgmma_wait(Registers&...) {
    emulator::hopper("wgmma_wait").products.wait(N);
}

// Keeps the addresses of `d` and `a`, which therefore are in memory and are read there at the wait.
template <class T, int N, bool kTransposedB>
void wgmma(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "an operand is Bf16 or Fp16");
    static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "N is 64, 96, 128, 192 or 256");
    emulator::WarpgroupFragments fragments{&d[0][0], a, b};
    emulator::hopper("wgmma").products.multiply(emulator::kElement<T>, N, kTransposedB, fragments);
}

template <int N>
void registers_increase() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a multiple of 8 from 24 to 256");
    emulator::hopper("registers_increase").collective("registers_increase", N, nullptr, [](const emulator::Operands&) {
    });
}

template <int N>
void registers_decrease() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a multiple of 8 from 24 to 256");
    emulator::hopper("registers_decrease").collective("registers_decrease", N, nullptr, [](const emulator::Operands&) {
    });
}

inline void named_barrier_sync(int id, int threads) {
    emulator::hopper("named_barrier_sync").meet("named_barrier_sync", id, static_cast<unsigned>(threads));
}

}  // namespace resnet_fused
