// fp32 operands of TF32 products: a * b = high(a) * high(b) + high(a) * low(b) + low(a) * high(b), but for 2^-22 of it.

#pragma once

#include "common/mma.h"
#include "common/numeric.h"

namespace resnet_fused::conv3x3 {

// An fp32 operand as TF32: its high part, and what the high part lacks.
struct Split {
    std::uint32_t high;
    std::uint32_t low;
};

__device__ __forceinline__ Split split(std::uint32_t bits) {
    const float value = bit_cast<float>(bits);
    const std::uint32_t high = to_tf32(value);
    return {high, to_tf32(value - bit_cast<float>(high))};
}

}  // namespace resnet_fused::conv3x3
