// What kernels for sm_80 and later use of PTX and of the warp: asynchronous copies, ldmatrix, mma, shared memory by
// address, shuffles. Names in brackets are those of the instruction in the PTX ISA ("Instruction Set").
//
// Shared memory has 32-bit byte addresses in its own window. It is read and written through these functions alone: they
// stay in program order, while the compiler may move an access through a pointer across them.
// With RESNET_FUSED_EMULATED the same functions run on the CPU (csrc/emulator).

#pragma once

#ifdef RESNET_FUSED_EMULATED
#include "emulator/mma.h"
#else

#include <cstdint>
#include <type_traits>

#include "common/numeric.h"

namespace resnet_fused {

#define RESNET_FUSED_DEVICE __device__ __forceinline__

RESNET_FUSED_DEVICE std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The dynamic shared memory of the block. Aligned so that the 128-byte swizzle, which repeats every 1024 bytes, depends
// on the offset alone.
RESNET_FUSED_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

// Copies 16 bytes from global to shared memory, or writes zeros if not `valid` (`from` stays unread, but must be a
// legal pointer). [cp.async]
RESNET_FUSED_DEVICE void cp_async16(std::uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

// Makes this thread's copies since the last commit one group. [cp.async.commit_group]
RESNET_FUSED_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most the N newest groups of this thread are under way. [cp.async.wait_group]
template <int N>
RESNET_FUSED_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives of matrix i
// in r[i] the elements 2 * (l % 4) and + 1 of row l / 4. [ldmatrix]
RESNET_FUSED_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// The same of the transposed matrices: rows 2 * (l % 4) and + 1 of column l / 4. [ldmatrix.trans]
RESNET_FUSED_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// D += A * B, 16x8 += 16x16 * 16x8, fp32 accumulation. With g = lane / 4 and t = lane % 4:
// a: rows g, g + 8, g, g + 8 of columns 2t, + 1 (a[0], a[1]) and 2t + 8, + 9 (a[2], a[3]); b: rows 2t, + 1 (b0) and
// 2t + 8, + 9 (b1) of column g; d: columns 2t, + 1 of row g, then of row g + 8. [mma.m16n8k16]
template <class T>
RESNET_FUSED_DEVICE void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (std::is_same_v<T, Bf16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(std::is_same_v<T, Fp16>, "an operand is Bf16 or Fp16");
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// 16x8 += 16x8 * 8x8. a: rows g, g + 8, g, g + 8 of column t (a[0], a[1]) and t + 4 (a[2], a[3]); b: rows t (b0) and
// t + 4 (b1) of column g; d as above. The chip ignores the lower 13 bits of an operand. [mma.m16n8k8]
RESNET_FUSED_DEVICE void mma_1688_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds to nearest, ties away from zero. [cvt.rna.tf32.f32]
RESNET_FUSED_DEVICE std::uint32_t to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
    return bits;
}

RESNET_FUSED_DEVICE uint4 load_shared16(std::uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

RESNET_FUSED_DEVICE void store_shared16(std::uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// One element of 2 or 4 bytes.
template <class T>
RESNET_FUSED_DEVICE T load_shared(std::uint32_t address) {
    if constexpr (sizeof(T) == 2) {
        std::uint16_t bits;
        asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(bits) : "r"(address) : "memory");
        return bit_cast<T>(bits);
    } else {
        std::uint32_t bits;
        asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(bits) : "r"(address) : "memory");
        return bit_cast<T>(bits);
    }
}

template <class T>
RESNET_FUSED_DEVICE void store_shared(std::uint32_t address, T value) {
    if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(address), "h"(bit_cast<std::uint16_t>(value)) : "memory");
    } else {
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(bit_cast<std::uint32_t>(value)) : "memory");
    }
}

RESNET_FUSED_DEVICE float load_shared_float(std::uint32_t address) {
    return load_shared<float>(address);
}

RESNET_FUSED_DEVICE void store_shared_float(std::uint32_t address, float value) {
    store_shared<float>(address, value);
}

// For memory that no thread writes while the kernel runs. [ld.global.nc]
RESNET_FUSED_DEVICE uint4 load_global16(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

RESNET_FUSED_DEVICE void store_global16(void* to, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// All 32 lanes take part in a shuffle and in warp_sync.
constexpr unsigned kAllLanes = 0xffffffffu;

RESNET_FUSED_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}

RESNET_FUSED_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}

RESNET_FUSED_DEVICE float shuffle(float value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
}

RESNET_FUSED_DEVICE void warp_sync() {
    __syncwarp(kAllLanes);
}

RESNET_FUSED_DEVICE void block_sync() {
    __syncthreads();
}

// Orders this thread's accesses to global memory before and after, for all threads of the device.
RESNET_FUSED_DEVICE void thread_fence() {
    __threadfence();
}

// Adds to global memory; the value before.
RESNET_FUSED_DEVICE int atomic_add(int* to, int amount) {
    return atomicAdd(to, amount);
}

}  // namespace resnet_fused

#endif  // RESNET_FUSED_EMULATED
