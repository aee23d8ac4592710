// The products of portable_wgrad.cu: a warp's accumulators, what they are made of, and where they go.
//
// A warp has a third of the taps (warp / 4). Of 16-bit elements it has all 64 filters and 16 of the channels (warp %
// 4): 16 positions are 24 mma for 7 ldmatrix of 512 bytes. Of fp32 it has all 32 filters and channels, and a quarter of
// a block's positions (warp % 4); the quarters are added at the end, in order: 8 positions are 24 products (kFp32: of 3
// mma) for 8 loads of 512 bytes. A thread has 96 accumulators.

#pragma once

#include "conv3x3/portable_wgrad_operands.cuh"
#include "conv3x3/tf32.cuh"

namespace resnet_fused::conv3x3::portable_wgrad {

constexpr int kQuarters = 4;  // warps with the same taps
constexpr int kSameQuarter = kThreads / kQuarters;

// Where a lane finds the rows of its warp's taps.
struct TapRows {
    const Params& p;
    std::uint32_t shared;
    std::uint32_t masks;
    int row[kWarpTaps];  // for the lane's position of the split's first product, counted through all rings

    __device__ __forceinline__ TapRows(const Params& params, std::uint32_t memory, int third, int lane_position)
        : p(params), shared(memory), masks(memory + mask_offset(params, third, lane_position)) {
        const Plan& plan = p.problem.plan;
#pragma unroll
        for (int i = 0; i < kWarpTaps; ++i) {
            const int tap = third * kWarpTaps + i;
            int fill = 0;
            while (tap >= plan.fill[fill].first_tap + plan.fill[fill].taps) {
                ++fill;
            }
            row[i] = fill * (p.slot_mask + 1) + plan.tap[tap].shift - plan.fill[fill].lo + lane_position;
        }
    }

    // Bit i says whether tap i is inside the image.
    __device__ __forceinline__ std::uint32_t mask(int row_of_stages) const {
        return load_shared<std::uint16_t>(masks + static_cast<std::uint32_t>(row_of_stages) * kMaskBytes);
    }

    // A chunk of what tap i reads; `position` is the product's first, in the split. Zeros are read from the banks that
    // the row would have been read from.
    __device__ __forceinline__ std::uint32_t address(int i, int position, std::uint32_t mask, int chunk) const {
        const int at = (row[i] & ~p.slot_mask) | ((position + row[i]) & p.slot_mask);
        const std::uint32_t offset = swizzled(at, chunk);
        return shared + (mask >> i & 1 ? p.x + offset : p.zeros + offset % kRowBytes);
    }
};

// d[tap][filters][channels], fragments of 16 filters and 8 channels.
template <Type kType>
struct Accumulators {
    static constexpr bool kWide = sizeof(Element<kType>) == 4;
    static constexpr int kFm = kWide ? 2 : 4;
    static constexpr int kFn = kWide ? 4 : 2;
    static constexpr int kStep = kWide ? 8 : 16;           // positions of one product
    static constexpr int kShares = kWide ? kQuarters : 1;  // of a block's positions
    float d[kWarpTaps][kFm][kFn][4];
};

// A product of positions `position` and on of the split, rows `row` and on of dy's stages.
template <Type kType>
__device__ __forceinline__ void multiply_narrow(Accumulators<kType>& acc, const TapRows& taps, int row, int position,
                                                int quarter, int lane) {
    const std::uint32_t dy = taps.shared + static_cast<std::uint32_t>(row * kRowBytes);
    std::uint32_t a[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        ldmatrix_x4_trans(a[i], dy + swizzled(lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2));
    }
    const std::uint32_t mask = taps.mask(row);
#pragma unroll
    for (int tap = 0; tap < kWarpTaps; ++tap) {
        std::uint32_t b[4];
        ldmatrix_x4_trans(b, taps.address(tap, position, mask, 2 * quarter + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            mma_16816<Element<kType>>(acc.d[tap][i][0], a[i], b[0], b[1]);
            mma_16816<Element<kType>>(acc.d[tap][i][1], a[i], b[2], b[3]);
        }
    }
}

// Lane 4g + t reads chunk g of positions 2t and 2t + 1 of the eight, four words each. So position 2t is the product's
// t, 2t + 1 its t + 4; filter 4g + i is row g of half i % 2 of fragment i / 2; channel 4g + j is column g of fragment
// j. The eight lanes whose words are read at a time have different banks.
template <Type kType>
__device__ __forceinline__ void multiply_wide(Accumulators<kType>& acc, const TapRows& taps, int row, int position,
                                              int lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    const std::uint32_t dy = taps.shared + static_cast<std::uint32_t>(row * kRowBytes);
    const uint4 dy0 = load_shared16(dy + swizzled(2 * t, g));
    const uint4 dy1 = load_shared16(dy + swizzled(2 * t + 1, g));
    const Split a[2][4] = {{split(dy0.x), split(dy0.y), split(dy1.x), split(dy1.y)},
                           {split(dy0.z), split(dy0.w), split(dy1.z), split(dy1.w)}};
    const std::uint32_t mask0 = taps.mask(row);
    const std::uint32_t mask1 = taps.mask(row + 1);
#pragma unroll
    for (int tap = 0; tap < kWarpTaps; ++tap) {
        const uint4 x0 = load_shared16(taps.address(tap, position, mask0, g));
        const uint4 x1 = load_shared16(taps.address(tap, position + 1, mask1, g));
        const std::uint32_t words[4][2] = {{x0.x, x1.x}, {x0.y, x1.y}, {x0.z, x1.z}, {x0.w, x1.w}};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Split b0 = split(words[j][0]);
            const Split b1 = split(words[j][1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float (&d)[4] = acc.d[tap][i][j];
                const std::uint32_t high[4] = {a[i][0].high, a[i][1].high, a[i][2].high, a[i][3].high};
                const std::uint32_t low[4] = {a[i][0].low, a[i][1].low, a[i][2].low, a[i][3].low};
                if constexpr (kType == Type::kFp32) {
                    mma_1688_tf32(d, low, b0.high, b1.high);
                    mma_1688_tf32(d, high, b0.low, b1.low);
                }
                mma_1688_tf32(d, high, b0.high, b1.high);
            }
        }
    }
}

// Adds the quarters' accumulators to the first quarter's, one after the other, through the start of shared memory.
template <Type kType>
__device__ __forceinline__ void add_quarters(Accumulators<kType>& acc, std::uint32_t shared, int thread) {
    float* const d = &acc.d[0][0][0][0];
    constexpr int kCount = sizeof(acc.d) / sizeof(float);
    const int quarter = thread / 32 % kQuarters;
    const int same = thread / 32 / kQuarters * 32 + thread % 32;  // of those of the quarter
    const std::uint32_t first = shared + static_cast<std::uint32_t>(same) * 4;
    for (int from = 1; from < kQuarters; ++from) {
        block_sync();
        if (quarter == from) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                store_shared_float(first + i * kSameQuarter * 4, d[i]);
            }
        }
        block_sync();
        if (quarter == 0) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                d[i] += load_shared_float(first + i * kSameQuarter * 4);
            }
        }
    }
}

template <Type kType>
constexpr std::size_t kQuarterBytes = Accumulators<kType>::kWide ? sizeof(Accumulators<kType>) * kSameQuarter : 0;

// Channels c, c + 1, ... of a filter's group, where the group has them.
template <int kCount>
__device__ __forceinline__ void store_channels(const Params& p, float* filter_tap, int c,
                                               const float (&values)[kCount]) {
    const int channels = p.problem.group_c;
    if (p.vector_partial) {
        struct alignas(4 * kCount) Vector {
            float v[kCount];
        };
        Vector vector;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            vector.v[i] = values[i];
        }
        if (c >= 0 && c < channels) *reinterpret_cast<Vector*>(filter_tap + c) = vector;
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (c + i >= 0 && c + i < channels) filter_tap[c + i] = values[i];
    }
}

template <Type kType>
constexpr int kStoredChannels = Accumulators<kType>::kWide ? 4 : 2;

template <Type kType>
__device__ __forceinline__ void store(const Params& p, const Share& share, const Accumulators<kType>& acc, int thread) {
    using Acc = Accumulators<kType>;
    const WgradParams& problem = p.problem;
    const int first_tap = thread / 32 / kQuarters * kWarpTaps;
    const int quarter = thread / 32 % kQuarters;
    const int g = thread % 32 / 4;
    const int t = thread % 4;
#pragma unroll
    for (int row = 0; row < 2 * Acc::kFm; ++row) {
        const int i = row / 2;
        const int half = row % 2;
        const int k = share.k + (Acc::kWide ? 4 * g + row : 8 * row + g);
        if (k >= problem.k) continue;
        const std::int64_t filter = static_cast<std::int64_t>(share.split) * problem.k + k;
        const int c = share.c - k / problem.group_k * problem.group_c;
#pragma unroll
        for (int tap = 0; tap < kWarpTaps; ++tap) {
            const int weight = problem.plan.tap[first_tap + tap].weight;
            float* const to = problem.partial + (filter * kTaps + weight) * problem.group_c;
            const auto& d = acc.d[tap][i];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int e = 2 * half + n;
                if constexpr (Acc::kWide) {
                    store_channels<4>(p, to, c + 8 * t + 4 * n, {d[0][e], d[1][e], d[2][e], d[3][e]});
                } else {
                    store_channels<2>(p, to, c + 16 * quarter + 8 * n + 2 * t, {d[n][2 * half], d[n][2 * half + 1]});
                }
            }
        }
    }
}

}  // namespace resnet_fused::conv3x3::portable_wgrad
