// Problem description and launch interface of bn_finalize; the formula stands in finalize.cu.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace pybind11 {
class module_;
}

namespace resnet_fused {

struct FinalizeParams {
    const std::int32_t* count;  // (T,)
    const float* mean;          // (T, C)
    const float* m2;            // (T, C)
    const float* gamma;         // (C,) or null for ones
    const float* beta;          // (C,) or null for zeros
    float* scale;               // (C,)
    float* shift;               // (C,)
    float* batch_mean;          // (C,)
    float* rstd;                // (C,)
    float* var_unbiased;        // (C,)
    void* workspace;            // finalize_workspace(T, C) bytes, aligned to 8, or null where that is 0
    int tiles;                  // T
    int channels;               // C
    float eps;
};

// Bytes of device memory that a launch needs for partial results.
std::size_t finalize_workspace(int tiles, int channels);

// Enqueues the kernels on `stream`, whose device must be current.
void launch_finalize(const FinalizeParams& params, cudaStream_t stream);

// CUDA's text if the current device cannot run the kernels, else empty.
std::string finalize_unsupported();

void register_batch_norm(pybind11::module_& module);

}  // namespace resnet_fused
