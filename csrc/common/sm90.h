// What kernels for sm_90a use of PTX beside mma.h: barriers in shared memory (mbarrier), tiled copies by the tensor
// memory accelerator, and matrix products of a warpgroup (wgmma). Names in brackets are those of the PTX ISA.
//
// With RESNET_FUSED_EMULATED the same functions run on the CPU (csrc/emulator).

#pragma once

#include <cuda.h>  // CUtensorMap alone: libcuda is never linked

#include "common/mma.h"

namespace resnet_fused {

// Where the B operand of a wgmma stands: rows of 128 bytes with the 128-byte swizzle, which puts the 16-byte chunk c of
// the row at address r to chunk c ^ (r / 128 % 8). From 8 rows to the next 8 are `stride_bytes`.
// K-major: a row is 64 k of one n. `leading_bytes` has no meaning. The next 16 k are 32 bytes on.
// MN-major (transposed): a row is 64 n of one k. To the next 64 n are `leading_bytes`. The next 16 k are 16 rows on.
// The row at `address` is the first of its 8: its address without the lower 7 bits is a multiple of 1024.
// [wgmma: Strides, Canonical Layouts, Matrix Descriptor Format]
inline constexpr std::uint64_t kSwizzle128 = 1;

RESNET_FUSED_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t leading_bytes,
                                                                   std::uint32_t stride_bytes) {
    const auto field = [](std::uint32_t bytes) { return static_cast<std::uint64_t>((bytes & 0x3ffff) >> 4); };
    return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | kSwizzle128 << 62;
}

}  // namespace resnet_fused

#ifdef RESNET_FUSED_EMULATED
#include "emulator/sm90.h"
#else

namespace resnet_fused {

// A barrier's phase ends when `count` threads have arrived and the bytes it was told to expect are there; the next
// phase then begins. [mbarrier.init]
RESNET_FUSED_DEVICE void barrier_init(std::uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}

// After the inits: shows them to the copy engine; other threads need a block_sync. [fence.mbarrier_init, fence.proxy]
RESNET_FUSED_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

// [mbarrier.arrive]
RESNET_FUSED_DEVICE void barrier_arrive(std::uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// [mbarrier.arrive.expect_tx]
RESNET_FUSED_DEVICE void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Expects bytes without arriving. [mbarrier.expect_tx]
RESNET_FUSED_DEVICE void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: that of a new barrier's first phase is 0, and a wait with parity 1
// returns at once. [mbarrier.try_wait.parity]
RESNET_FUSED_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
    std::uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Arrives (one of the barrier's count) once all earlier cp_async16 of this thread are done. [cp.async.mbarrier.arrive]
RESNET_FUSED_DEVICE void cp_async_arrive(std::uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

// Copies the map's box at these coordinates (innermost first) to shared memory at `to`, a multiple of 128, as rows of
// 128 bytes, swizzled by their address; elements outside the tensor are zero. The whole box's bytes count for the
// barrier. One thread calls it. [cp.async.bulk.tensor]
RESNET_FUSED_DEVICE void tma_load_2d(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1)
        : "memory");
}

RESNET_FUSED_DEVICE void tma_load_3d(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int c0, int c1,
                                     int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// [prefetch.tensormap]
RESNET_FUSED_DEVICE void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Shows what this thread wrote to shared memory by ordinary stores to wgmma and to the copy engine. [fence.proxy.async]
RESNET_FUSED_DEVICE void proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Holds registers to this point of the program for the compiler, which does not know that wgmma works on after its asm.
RESNET_FUSED_DEVICE void pin(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

RESNET_FUSED_DEVICE void pin(std::uint32_t& value) {
    asm volatile("" : "+r"(value)::"memory");
}

template <class T, int N>
RESNET_FUSED_DEVICE void pin(T (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        pin(values[i]);
    }
}

// Before the first wgmma that uses registers which other instructions wrote; best named here, so that the compiler
// writes none of them later. [wgmma.fence]
template <class... Registers>
RESNET_FUSED_DEVICE void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Makes the warpgroup's products since the last commit one group. [wgmma.commit_group]
RESNET_FUSED_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most the N newest groups are under way; until then the registers (a and d) and the shared memory of a
// product are in use. Registers that are read next are best named here. [wgmma.wait_group]
template <int N, class... Registers>
RESNET_FUSED_DEVICE void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
    (pin(registers), ...);
}

// Lists of operands for the asm of wgmma: "%t0, ..., %t9, ", the first so many, and those of d from row i on.
#define RESNET_FUSED_TEN(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define RESNET_FUSED_30 RESNET_FUSED_TEN() RESNET_FUSED_TEN(1) RESNET_FUSED_TEN(2)
#define RESNET_FUSED_60 RESNET_FUSED_30 RESNET_FUSED_TEN(3) RESNET_FUSED_TEN(4) RESNET_FUSED_TEN(5)
#define RESNET_FUSED_90 RESNET_FUSED_60 RESNET_FUSED_TEN(6) RESNET_FUSED_TEN(7) RESNET_FUSED_TEN(8)
#define RESNET_FUSED_120 RESNET_FUSED_90 RESNET_FUSED_TEN(9) RESNET_FUSED_TEN(10) RESNET_FUSED_TEN(11)
#define RESNET_FUSED_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define RESNET_FUSED_D4(i) RESNET_FUSED_D(i), RESNET_FUSED_D(i + 1), RESNET_FUSED_D(i + 2), RESNET_FUSED_D(i + 3)
#define RESNET_FUSED_D8(i) RESNET_FUSED_D4(i), RESNET_FUSED_D4(i + 4)

// The asm for one N: the numbers of its operands (those of d, of a, of b, of the transposition), then d itself.
#define RESNET_FUSED_WGMMA(type, n, d_numbers, a_numbers, b_number, transposed, ...)                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                 "." type " {" d_numbers "}, {" a_numbers "}, " b_number ", p, 1, 1, " transposed ";\n}\n"      \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB ? 1 : 0)                \
                 : "memory")

#define RESNET_FUSED_WGMMA_SIZES(type)                                                                              \
    if constexpr (N == 64) {                                                                                        \
        RESNET_FUSED_WGMMA(type, 64, RESNET_FUSED_30 "%30, %31", "%32, %33, %34, %35", "%36", "%37",                \
                           RESNET_FUSED_D8(0));                                                                     \
    } else if constexpr (N == 96) {                                                                                 \
        RESNET_FUSED_WGMMA(type, 96, RESNET_FUSED_30 RESNET_FUSED_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47",  \
                           "%48, %49, %50, %51", "%52", "%53", RESNET_FUSED_D8(0), RESNET_FUSED_D4(8));             \
    } else if constexpr (N == 128) {                                                                                \
        RESNET_FUSED_WGMMA(type, 128, RESNET_FUSED_60 "%60, %61, %62, %63", "%64, %65, %66, %67", "%68", "%69",     \
                           RESNET_FUSED_D8(0), RESNET_FUSED_D8(8));                                                 \
    } else if constexpr (N == 192) {                                                                                \
        RESNET_FUSED_WGMMA(type, 192, RESNET_FUSED_90 "%90, %91, %92, %93, %94, %95", "%96, %97, %98, %99", "%100", \
                           "%101", RESNET_FUSED_D8(0), RESNET_FUSED_D8(8), RESNET_FUSED_D8(16));                    \
    } else {                                                                                                        \
        static_assert(N == 256, "N is 64, 96, 128, 192 or 256");                                                    \
        RESNET_FUSED_WGMMA(type, 256, RESNET_FUSED_120 "%120, %121, %122, %123, %124, %125, %126, %127",            \
                           "%128, %129, %130, %131", "%132", "%133", RESNET_FUSED_D8(0), RESNET_FUSED_D8(8),        \
                           RESNET_FUSED_D8(16), RESNET_FUSED_D8(24));                                               \
    }

// D += A * B of a warpgroup, 64xN += 64x16 * 16xN, fp32 accumulation, under way until wgmma_wait. Warp w % 4 has rows
// 16 * (w % 4) to + 15: `a` is their fragment of mma_16816, d[i] that of columns 8i to + 7. `b` is a matrix_descriptor,
// transposed: MN-major. [wgmma.mma_async]
template <class T, int N, bool kTransposedB>
RESNET_FUSED_DEVICE void wgmma(float (&d)[N / 8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    if constexpr (std::is_same_v<T, Bf16>) {
        RESNET_FUSED_WGMMA_SIZES("bf16")
    } else {
        static_assert(std::is_same_v<T, Fp16>, "an operand is Bf16 or Fp16");
        RESNET_FUSED_WGMMA_SIZES("f16")
    }
}

// Changes this warpgroup's registers a thread to N, a multiple of 8 from 24 to 256. The block's launch bounds must
// state its threads and the blocks of a multiprocessor. [setmaxnreg]
template <int N>
RESNET_FUSED_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

template <int N>
RESNET_FUSED_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// Barrier `id` (1 to 15; block_sync has 0) of `threads` threads, whole warps. [barrier.cta.sync]
RESNET_FUSED_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace resnet_fused

#endif  // RESNET_FUSED_EMULATED
