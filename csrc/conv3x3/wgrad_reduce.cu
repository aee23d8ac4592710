// wgrad_reduce: adds up the splits of a weight's gradient.
//
//     out[i] = sum over splits s of partial[s][i], in the order of s
//
// partial (splits, elements) fp32; out (elements,) fp32, fp16 or bf16.
// Work: a thread has kCount neighbouring elements (4, or 1 where 16-byte accesses are not aligned) and reads the splits
//     kBatch at a time: so many loads are under way together.
// Bytes: 4 * splits * elements read, mostly from the second-level cache, and the result written.
// Numerics: fp32 sums, rounded once.

#include "common/launch.h"
#include "common/numeric.h"
#include "conv3x3/launch.h"

namespace resnet_fused::conv3x3 {

namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T v[kCount];
};

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    wgrad_reduce_kernel(const float* __restrict__ partial, int splits, std::int64_t elements, T* __restrict__ out) {
    const std::int64_t packs = elements / kCount;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= packs) return;
    const auto* const from = reinterpret_cast<const Pack<float, kCount>*>(partial) + at;
    Pack<float, kCount> sum = {};
    for (int first = 0; first < splits; first += kBatch) {
        Pack<float, kCount> batch[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i < splits) batch[i] = from[(first + i) * packs];
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                sum.v[j] += batch[i].v[j];
            }
        }
    }
    Pack<T, kCount> rounded;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        rounded.v[j] = from_float<T>(sum.v[j]);
    }
    reinterpret_cast<Pack<T, kCount>*>(out)[at] = rounded;
}

template <class T>
void reduce(const float* partial, int splits, std::int64_t elements, void* out, cudaStream_t stream) {
    const auto address = reinterpret_cast<std::uintptr_t>(partial) | reinterpret_cast<std::uintptr_t>(out);
    const bool vector = elements % 4 == 0 && address % 16 == 0;
    const auto kernel = vector ? wgrad_reduce_kernel<T, 4> : wgrad_reduce_kernel<T, 1>;
    const unsigned grid = grid_x(vector ? elements / 4 : elements, kThreads, "conv3x3_wgrad", "weight");
    launch(kernel, grid, kThreads, 0, stream, partial, splits, elements, static_cast<T*>(out));
}

}  // namespace

void run_wgrad_reduce(const float* partial, int splits, long long elements, void* out, Out type, cudaStream_t stream) {
    if (elements == 0) return;
    switch (type) {
        case Out::kFp16:
            return reduce<Fp16>(partial, splits, elements, out, stream);
        case Out::kBf16:
            return reduce<Bf16>(partial, splits, elements, out, stream);
        case Out::kFp32:
            return reduce<float>(partial, splits, elements, out, stream);
    }
}

}  // namespace resnet_fused::conv3x3
