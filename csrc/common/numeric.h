// Element types, their conversion to float and back, and 16-byte chunks of them; for device and host.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace resnet_fused {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements of a 16-byte chunk

template <class To, class From>
RESNET_FUSED_HOST_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(to));
    return to;
}

template <class T>
RESNET_FUSED_HOST_DEVICE float to_float(T value) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return __bfloat162float(value);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        return __half2float(value);
    } else {
        static_assert(std::is_same_v<T, float>, "an element is Bf16, Fp16 or float");
        return value;
    }
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
RESNET_FUSED_HOST_DEVICE T from_float(float value) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return __float2bfloat16_rn(value);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        return __float2half_rn(value);
    } else {
        static_assert(std::is_same_v<T, float>, "an element is Bf16, Fp16 or float");
        return value;
    }
}

// The elements of one 32-bit word: two of 16 bits, the lower half first, or one float.
template <class T>
RESNET_FUSED_HOST_DEVICE void unpack_word(std::uint32_t word, float* values) {
    if constexpr (std::is_same_v<T, Bf16>) {  // a bfloat16 is the upper half of a float
        values[0] = bit_cast<float>(word << 16);
        values[1] = bit_cast<float>(word & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        const float2 both = __half22float2(bit_cast<__half2>(word));
        values[0] = both.x;
        values[1] = both.y;
    } else {
        values[0] = bit_cast<float>(word);
    }
}

template <class T>
RESNET_FUSED_HOST_DEVICE std::uint32_t pack_word(const float* values) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return bit_cast<std::uint32_t>(__floats2bfloat162_rn(values[0], values[1]));
    } else if constexpr (std::is_same_v<T, Fp16>) {
        return bit_cast<std::uint32_t>(__floats2half2_rn(values[0], values[1]));
    } else {
        return bit_cast<std::uint32_t>(values[0]);
    }
}

template <class T>
RESNET_FUSED_HOST_DEVICE void unpack(uint4 chunk, float (&values)[kChunk<T>]) {
    constexpr int kWord = 4 / sizeof(T);
    unpack_word<T>(chunk.x, values);
    unpack_word<T>(chunk.y, values + kWord);
    unpack_word<T>(chunk.z, values + 2 * kWord);
    unpack_word<T>(chunk.w, values + 3 * kWord);
}

template <class T>
RESNET_FUSED_HOST_DEVICE uint4 pack(const float (&values)[kChunk<T>]) {
    constexpr int kWord = 4 / sizeof(T);
    return {pack_word<T>(values), pack_word<T>(values + kWord), pack_word<T>(values + 2 * kWord),
            pack_word<T>(values + 3 * kWord)};
}

}  // namespace resnet_fused
