// The arithmetic of merging statistics, for device and host: the kernel uses it, and test_merge.cpp checks it.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace resnet_fused {

// Statistics of `count` values: their mean, and m2 = sum((value - mean)^2). The count is an exact integer: a float
// counts no further than 2^24, and one channel of a batch of 256 images of 256 x 256 has that many values.
struct Moments {
    std::int64_t count;
    float mean;
    float m2;
};

// Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1:
//     mean = a.mean + delta * nb/n,  m2 = a.m2 + b.m2 + delta^2 * na*nb/n,  delta = b.mean - a.mean
// An empty side is ignored, whatever its mean and m2 hold. Half of delta is kept, which cannot overflow. Where it is
// not finite all the same, a mean is: their sum then is what the mean over all values is, inf or NaN (m2 is NaN
// already).
RESNET_FUSED_HOST_DEVICE Moments merge(const Moments& a, const Moments& b) {
    if (b.count <= 0) return a;
    if (a.count <= 0) return b;
    Moments merged;
    merged.count = a.count + b.count;
    const float share_b = static_cast<float>(b.count) / static_cast<float>(merged.count);
    const float half_delta = fmaf(0.5f, b.mean, -0.5f * a.mean);
    merged.mean = fabsf(half_delta) <= FLT_MAX ? fmaf(half_delta, 2.0f * share_b, a.mean) : a.mean + b.mean;
    merged.m2 = fmaf(half_delta * half_delta, 4.0f * static_cast<float>(a.count) * share_b, a.m2 + b.m2);
    return merged;
}

// What a batch norm needs of one channel.
struct Finalized {
    float scale;
    float shift;
    float mean;
    float rstd;
    float var_unbiased;
};

// The literal formula: without any value rstd is NaN and mean 0, with one value var_unbiased is 0/0 = NaN, as in
// PyTorch.
RESNET_FUSED_HOST_DEVICE Finalized finalize(const Moments& total, float gamma, float beta, float eps) {
    Finalized result;
    result.mean = total.mean;
    result.rstd = 1.0f / sqrtf(total.m2 / static_cast<float>(total.count) + eps);
    result.scale = gamma * result.rstd;
    result.shift = fmaf(-total.mean, result.scale, beta);
    result.var_unbiased = total.m2 / static_cast<float>(total.count - 1);
    return result;
}

}  // namespace resnet_fused
