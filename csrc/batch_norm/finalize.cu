// bn_finalize: merges the statistics of T tiles into what the next kernel applies.
//
//     n = sum_t count[t],  mean = sum_t count[t] * mean[t] / n,  m2 = sum_t m2[t] + count[t] * (mean[t] - mean)^2
//     rstd = 1 / sqrt(m2/n + eps),  scale = gamma * rstd,  shift = beta - mean * scale,  var_unbiased = m2 / (n - 1)
//
// Layout: count (T,) int32; mean, m2 (T, C) fp32, C contiguous; gamma, beta and all results (C,) fp32.
// Work: a block has kChannels x kRows threads. It takes kChannels neighbouring channels (one per lane: 128-byte loads)
// and a
//     slice of the tiles; row r merges tiles r, r + kRows, ... of the slice, then the rows merge as a binary tree in
//     shared memory. With more than kSliceTiles tiles there are several slices: a first kernel leaves one (count, mean,
//     m2) per slice and channel in the workspace, and a second merges those. Else the second reads the tiles directly.
// Bytes: 8*T*C + 4*T read, 20*C written; the workspace adds at most 1/64 of that.
// Numerics: fp32 means and M2 merged pairwise (merge.h), counts in 64-bit integers, IEEE division and square root. The
// order
//     of merging depends on T alone: no atomics, every run gives the same bits.

#include "batch_norm/finalize.h"

#include <algorithm>

#include "batch_norm/merge.h"
#include "common/launch.h"

namespace resnet_fused {

namespace {

constexpr int kChannels = 32;     // channels a block: one warp's width
constexpr int kRows = 16;         // tiles merged side by side; a power of two
constexpr int kSliceTiles = 256;  // tiles one block merges: 16 a thread, short enough that latency does not add up
constexpr int kSlices = 1024;     // most slices: beyond, slices grow

struct Slices {
    int tiles;  // per slice
    int count;
};

Slices slices_of(int tiles) {
    const std::int64_t share = std::max<std::int64_t>(kSliceTiles, ceil_div(tiles, kSlices));
    return {static_cast<int>(share), static_cast<int>(std::max<std::int64_t>(1, ceil_div(tiles, share)))};
}

// Merges tiles [begin, end) of one channel per lane. The result is valid in row 0.
template <typename Count>
__device__ Moments merge_tiles(const Count* __restrict__ count, const float* __restrict__ mean,
                               const float* __restrict__ m2, std::int64_t channels, std::int64_t channel,
                               std::int64_t begin, std::int64_t end) {
    __shared__ Moments rows[kRows][kChannels];
    Moments total{0, 0.0f, 0.0f};
    if (channel < channels) {
#pragma unroll 4
        for (std::int64_t tile = begin + threadIdx.y; tile < end; tile += kRows) {
            const std::int64_t at = tile * channels + channel;
            total = merge(total, Moments{count[tile], mean[at], m2[at]});
        }
    }
    rows[threadIdx.y][threadIdx.x] = total;
    for (int half = kRows / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
            rows[threadIdx.y][threadIdx.x] =
                merge(rows[threadIdx.y][threadIdx.x], rows[threadIdx.y + half][threadIdx.x]);
        }
    }
    return rows[threadIdx.y][threadIdx.x];  // row 0 reads what it wrote itself
}

__global__ void __launch_bounds__(kChannels* kRows)
    merge_slices_kernel(FinalizeParams params, int slice_tiles, std::int64_t* __restrict__ slice_count,
                        float* __restrict__ slice_mean, float* __restrict__ slice_m2) {
    const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kChannels + threadIdx.x;
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * slice_tiles;
    const std::int64_t end = min(begin + slice_tiles, static_cast<std::int64_t>(params.tiles));
    const Moments total = merge_tiles(params.count, params.mean, params.m2, params.channels, channel, begin, end);
    if (threadIdx.y != 0 || channel >= params.channels) return;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * params.channels + channel;
    slice_mean[at] = total.mean;
    slice_m2[at] = total.m2;
    if (channel == 0) slice_count[blockIdx.y] = total.count;
}

template <typename Count>
__global__ void __launch_bounds__(kChannels* kRows)
    finalize_kernel(FinalizeParams params, const Count* __restrict__ count, const float* __restrict__ mean,
                    const float* __restrict__ m2, int tiles) {
    const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kChannels + threadIdx.x;
    const Moments total = merge_tiles(count, mean, m2, params.channels, channel, 0, tiles);
    if (threadIdx.y != 0 || channel >= params.channels) return;
    const float gamma = params.gamma ? params.gamma[channel] : 1.0f;
    const float beta = params.beta ? params.beta[channel] : 0.0f;
    const Finalized result = finalize(total, gamma, beta, params.eps);
    params.scale[channel] = result.scale;
    params.shift[channel] = result.shift;
    params.batch_mean[channel] = result.mean;
    params.rstd[channel] = result.rstd;
    params.var_unbiased[channel] = result.var_unbiased;
}

}  // namespace

std::size_t finalize_workspace(int tiles, int channels) {
    const std::size_t slices = slices_of(tiles).count;
    if (slices == 1) return 0;
    return slices * (sizeof(std::int64_t) + 2 * sizeof(float) * channels);
}

void launch_finalize(const FinalizeParams& params, cudaStream_t stream) {
    const dim3 block(kChannels, kRows);
    const unsigned groups = grid_x(params.channels, kChannels, "bn_finalize", "channels");
    const Slices slices = slices_of(params.tiles);
    if (slices.count == 1) {
        finalize_kernel<<<groups, block, 0, stream>>>(params, params.count, params.mean, params.m2, params.tiles);
        RESNET_FUSED_CHECK_LAUNCH();
        return;
    }
    auto* const count = static_cast<std::int64_t*>(params.workspace);
    auto* const mean = reinterpret_cast<float*>(count + slices.count);
    float* const m2 = mean + static_cast<std::int64_t>(slices.count) * params.channels;
    const dim3 grid(groups, slices.count);
    merge_slices_kernel<<<grid, block, 0, stream>>>(params, slices.tiles, count, mean, m2);
    RESNET_FUSED_CHECK_LAUNCH();
    finalize_kernel<std::int64_t><<<groups, block, 0, stream>>>(params, count, mean, m2, slices.count);
    RESNET_FUSED_CHECK_LAUNCH();
}

std::string finalize_unsupported() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, finalize_kernel<std::int32_t>);
    if (status == cudaSuccess) return {};
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace resnet_fused
