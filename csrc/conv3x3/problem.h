// What the 3x3 kernels are given: tensors as they are read and written, and the problem. geometry.h has the pixels.
//
// Activations are (pixels, channels) matrices, channels contiguous, rows dense. The weight is (K, 3, 3, C / groups),
// PyTorch's channels_last weight. Pointers of parts that are not asked for are null.

#pragma once

#include <cuda.h>  // CUtensorMap, a type: libcuda is not linked

#include <cstdint>

#include "common/numeric.h"
#include "conv3x3/geometry.h"

namespace resnet_fused::conv3x3 {

enum class Direction : int { kFprop = 0, kDgrad = 1, kWgrad = 2 };

// Of elements and of their products: fp32 elements are multiplied as three TF32 products, or, kTf32, as one.
enum class Type : int { kFp16 = 0, kBf16 = 1, kFp32 = 2, kTf32 = 3 };

template <Type kType>
struct ElementOf {
    using T = float;
};
template <>
struct ElementOf<Type::kFp16> {
    using T = Fp16;
};
template <>
struct ElementOf<Type::kBf16> {
    using T = Bf16;
};
template <Type kType>
using Element = typename ElementOf<kType>::T;

constexpr int kRowBytes = 128;  // of a row in shared memory: one block of channels
constexpr int kRowChunks = 8;   // 16-byte chunks of it

template <class T>
constexpr int kBlock = kRowBytes / static_cast<int>(sizeof(T));  // channels of a block

enum class Sign : int { kNone = 0, kBits = 1, kValues = 2 };

// What a ReLU let through: one bit an element (bit i of byte j is element 8*j + i), or a tensor whose sign tells.
struct Mask {
    const void* data;
    Sign sign;
};

// An operand that is formed while it is read.
//     kPlain      values
//     kActivated  relu(a * values + c)                             a deferred activation: a is its scale, c its shift
//     kGradient   a * masked(values) + (b * partner + c)           partner null: a * masked(values); a null as well:
//                                                                  masked(values)
enum class Form : int { kPlain = 0, kActivated = 1, kGradient = 2 };

struct Operand {
    const void* values;   // (pixels, channels)
    const void* partner;  // (pixels, channels) or null
    Mask mask;            // of values
    const float* a;       // (channels,)
    const float* b;
    const float* c;
    int channels;
    Form form;
};

// Where the statistics of one program's columns go, and who merges them: the last of the programs that share an n-tile.
struct Partials {
    float* first;   // (programs_m, target channels): mean, or sum of dz
    float* second;  // m2, or sum of dz * (x - mean) * rstd
    int* arrived;   // (tiles_n,) zeros, left at zero
};

// fprop:  out = [act](conv(source) + bias + residual), statistics of the rounded out
struct Forward {
    const float* bias;     // (K,) or null
    const void* residual;  // as out, or null
    bool relu;
    bool statistics;
    std::int32_t* count;  // (1,)
    float* mean;          // (K,)
    float* m2;            // (K,)
};

// dgrad:  dx = conv^T(source) + skip_scale * masked(skip); behind a deferred activation dx counts where
//         !(x * scale + shift <= 0); sums dbeta = sum dx, dgamma = sum dx * (x - mean) * rstd of the rounded dx
struct Backward {
    const void* x;       // as out; null for a plain input
    const float* scale;  // (C,)
    const float* shift;
    const float* mean;  // (C,) or null: no sums
    const float* rstd;
    float* dbeta;      // (C,)
    float* dgamma;     // (C,)
    const void* skip;  // as out, or null
    Mask skip_mask;
    float skip_scale;
    void* dy;  // as the source: dy is written here on the way; or null
};

struct ConvParams {
    Plan plan;
    Operand source;      // x, or dy
    const void* weight;  // (K, 3, 3, C / groups)
    void* out;           // (target pixels, target_channels)
    Partials partials;
    Forward forward;    // of fprop
    Backward backward;  // of dgrad
    int target_channels;
    int group_source;  // channels per group of the source, and of the target
    int group_target;
    int weight_inner;  // C / groups
    int tiles_m;       // of one class
    int tiles_n;
    int programs_m;      // the grid is programs_m * tiles_n
    bool vector_source;  // rows of source (and partner, values of the mask, dy) can be read 16 bytes at a time
    bool vector_weight;
    bool vector_target;  // so can rows of the target and of all that is read beside it
};

// The rest of a Hopper launch: what the bulk copy engine reads.
struct ConvMaps {
    CUtensorMap values;   // (channels, pixels)
    CUtensorMap partner;  // likewise
    CUtensorMap weight;   // (C, 9, K)
};

// dw[k][t][c] = sum_m dy[m][k] * x[source pixel of (m, t)][c], m over the plan's grid.
struct WgradParams {
    Plan plan;       // forward_plan
    Operand x;       // (source pixels, C)
    Operand dy;      // (grid positions, K)
    float* partial;  // (splits, K, 9, C / groups), or the result itself where it is fp32 and splits is 1
    int c, k;
    int group_c, group_k;  // channels per group
    int tiles_c, tiles_k;  // tiles_c: of one group's range at most
    int blocks;            // of grid positions, in all
    int blocks_per_split;
    int splits;
    bool vector_x;
    bool vector_dy;
};

}  // namespace resnet_fused::conv3x3
