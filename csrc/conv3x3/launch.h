// How the 3x3 kernels are launched: a configuration is offered a problem, says what its launch would need, and runs.
//
//     portable_conv.cu   fprop and dgrad by mma.sync, sm_80 and later       sm90_conv.cu   by wgmma, sm_90a
//     portable_wgrad.cu  wgrad likewise                                     sm90_wgrad.cu
//     wgrad_reduce.cu    the sum over splits, in fixed order

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3 {

enum class Chip : int { kPortable = 0, kHopper = 1 };

struct Config {
    Chip chip;
    int rows;     // of a tile: grid positions
    int columns;  // of a tile: target channels. wgrad: unused
    Feed feed;
};

// What a configuration needs for a problem.
struct Launch {
    Config config;
    unsigned blocks;
    unsigned threads;
    std::size_t shared;                // bytes
    int stages;                        // of the weight's ring; wgrad: of dy's
    int tiles_m, tiles_n, programs_m;  // fprop and dgrad
    int blocks_per_split, splits;      // wgrad
    double cycles;                     // sm_90a's fprop and dgrad: what it takes by a model, to compare; else 0
};

// Each plan_* reads the plan, channels, groups, forms and vector_* of the parameters, no pointer but whether it is
// null; it returns false where the configuration is not its own or cannot run the problem on `device` (the current
// one). Each run_* takes the same parameters with all pointers and the launch's members set.

bool plan_portable_conv(const Config& config, Type type, Direction direction, const ConvParams& params, int device,
                        Launch& launch);
void run_portable_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params,
                       cudaStream_t stream);

bool plan_portable_wgrad(const Config& config, Type type, const WgradParams& params, int device, Launch& launch);
void run_portable_wgrad(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream);

// sm_90a only; built as stubs (plan: false) where the extension has no code for it.
bool plan_sm90_conv(const Config& config, Type type, Direction direction, const ConvParams& params, int device,
                    Launch& launch);
void encode_sm90_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params, ConvMaps& maps);
void run_sm90_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params, const ConvMaps& maps,
                   cudaStream_t stream);

bool plan_sm90_wgrad(const Config& config, Type type, const WgradParams& params, int device, Launch& launch);
void run_sm90_wgrad(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream);

// out[i] = sum over splits of partial[split * elements + i], in the order of the splits; out has type Out.
enum class Out : int { kFp16 = 0, kBf16 = 1, kFp32 = 2 };
void run_wgrad_reduce(const float* partial, int splits, long long elements, void* out, Out type, cudaStream_t stream);

}  // namespace resnet_fused::conv3x3
