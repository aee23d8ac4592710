// The functions of common/mma.h on the CPU; there stands what they do.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/numeric.h"
#include "emulator/block.h"
#include "emulator/language.h"

namespace resnet_fused {

namespace emulator {

template <class T>
constexpr Element kElement = std::is_same_v<T, Bf16> ? Element::bf16 : Element::fp16;

template <class T>
T load(std::uint32_t address) {
    T value;
    block().enter("load_shared");
    std::memcpy(&value, block().shared.read(address, sizeof(T), block().thread()), sizeof(T));
    return value;
}

template <class T>
void store(std::uint32_t address, const T& value) {
    block().enter("store_shared");
    std::memcpy(block().shared.write(address, sizeof(T), block().thread()), &value, sizeof(T));
}

// What lane `source` brings.
std::uint32_t shuffle(const char* function, std::uint32_t value, int source);

// Global memory.
void check_aligned(const char* function, const void* pointer, std::size_t bytes);

}  // namespace emulator

inline std::uint32_t shared_address(const void* pointer) {
    return emulator::block().shared.address(pointer);
}

inline unsigned char* shared_memory() {
    return emulator::block().shared.data();
}

inline void cp_async16(std::uint32_t to, const void* from, bool valid) {
    emulator::block().enter("cp_async16");
    emulator::block().copies.copy(to, from, valid);
}

inline void cp_async_commit() {
    emulator::block().copies.commit();
}

template <int N>
void cp_async_wait() {
    emulator::block().enter("cp_async_wait");
    emulator::block().copies.wait_groups(N);
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row_address) {
    emulator::Row row{row_address, r};
    emulator::block().products.load_matrices(row, false);
}

inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t row_address) {
    emulator::Row row{row_address, r};
    emulator::block().products.load_matrices(row, true);
}

template <class T>
void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "an operand is Bf16 or Fp16");
    emulator::Fragments fragments{d, a, {b0, b1}};
    emulator::block().products.multiply(emulator::kElement<T>, fragments);
}

inline void mma_1688_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    emulator::Fragments fragments{d, a, {b0, b1}};
    emulator::block().products.multiply_tf32(fragments);
}

inline std::uint32_t to_tf32(float value) {
    const auto bits = bit_cast<std::uint32_t>(value);
    constexpr std::uint32_t kHalf = 1u << 12;  // of the last of the 10 bits that stay
    return value == value ? (bits + kHalf) & 0xffffe000u : 0x7fffffffu;
}

inline uint4 load_shared16(std::uint32_t address) {
    return emulator::load<uint4>(address);
}

inline void store_shared16(std::uint32_t address, uint4 v) {
    emulator::store(address, v);
}

template <class T>
T load_shared(std::uint32_t address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "one element of 2 or 4 bytes");
    return emulator::load<T>(address);
}

template <class T>
void store_shared(std::uint32_t address, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "one element of 2 or 4 bytes");
    emulator::store(address, value);
}

inline float load_shared_float(std::uint32_t address) {
    return load_shared<float>(address);
}

inline void store_shared_float(std::uint32_t address, float value) {
    store_shared<float>(address, value);
}

inline uint4 load_global16(const void* from) {
    uint4 v;
    emulator::check_aligned("load_global16", from, sizeof(v));
    std::memcpy(&v, from, sizeof(v));
    return v;
}

inline void store_global16(void* to, uint4 v) {
    emulator::check_aligned("store_global16", to, sizeof(v));
    std::memcpy(to, &v, sizeof(v));
}

inline std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
    const int lane = static_cast<int>(threadIdx.x % emulator::kLanes);
    return emulator::shuffle("shuffle_xor", value, lane ^ mask);
}

inline float shuffle_xor(float value, int mask) {
    return bit_cast<float>(shuffle_xor(bit_cast<std::uint32_t>(value), mask));
}

inline float shuffle(float value, int lane) {
    return bit_cast<float>(emulator::shuffle("shuffle", bit_cast<std::uint32_t>(value), lane));
}

inline void warp_sync() {
    emulator::block().collective("warp_sync", 0, nullptr, [](const emulator::Operands&) {});
}

inline void block_sync() {
    emulator::block().meet("block_sync", 0, blockDim.x);
}

inline void thread_fence() {}  // blocks run one after the other

inline int atomic_add(int* to, int amount) {
    const int before = *to;
    *to += amount;
    return before;
}

}  // namespace resnet_fused
