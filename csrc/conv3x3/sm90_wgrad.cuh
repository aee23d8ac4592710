// How x and dy reach the products of sm90_wgrad.cu: what is where in shared memory, and the warpgroup that brings it.
//
// Shared memory has rows of 128 bytes, 64 channels of a grid position, swizzled (geometry.h), in blocks of 64
// positions.
//     dy     `stages` blocks in turn, read by wgmma; behind them as many of its partner, if there is one
//     x      a ring for each fill of the plan, read by ldmatrix
//     zeros  a row, read in place of pixels outside the image
//     masks  of each stage, nine bits for each position: which taps are inside
//
// A block of dy reads its own 64 rows of a fill and up to plan.extra more, `lead` blocks of them at most. So step s
// brings block s of x, counted from the first row that the program reads, and block s - lead of dy, which is the first
// that needs it. It overwrites what last served block s - (blocks of a ring) of dy, which is not later than block
// s - lead - stages, whose stage it takes: one barrier tells that both are free.

#pragma once

#include "common/sm90.h"
#include "conv3x3/operand.cuh"

namespace resnet_fused::conv3x3 {

namespace sm90_wgrad {

constexpr int kTile = 64;  // channels, and filters, of a program
constexpr int kPositions = 64;
constexpr int kBlockBytes = kPositions * kRowBytes;
constexpr int kGroup = 128;   // threads of a warpgroup
constexpr int kMaxAhead = 2;  // steps whose copies are under way

struct Params {
    WgradParams problem;
    int stages;
    int lead;
    int dilation;
    bool x_is_grid;                                    // one fill, of consecutive pixels
    std::uint32_t ring;                                // bytes, a power of two
    std::uint32_t partner, x, zeros, masks, barriers;  // offsets in shared memory; dy is at 0
};

// What a program computes.
struct Share {
    int k, c;  // first filter and channel
    int split;
    int first;   // position
    int blocks;  // of positions
};

__device__ __forceinline__ Share share_of(const WgradParams& problem) {
    const int tiles = problem.tiles_k * problem.tiles_c;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    const int split = static_cast<int>(blockIdx.x) / tiles;
    const int block = split * problem.blocks_per_split;
    return {tile / problem.tiles_c * kTile, tile % problem.tiles_c * kTile, split, block * kPositions,
            min(problem.blocks_per_split, problem.blocks - block)};
}

// A stage, and the parity of its turn.
struct Turn {
    int stage = 0;
    std::uint32_t parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++stage < stages) return;
        stage = 0;
        parity ^= 1;
    }
};

// The block of a stage is there, with all rows of x that it reads.
__device__ __forceinline__ std::uint32_t full_barrier(const Params& p, std::uint32_t shared, int stage) {
    return shared + p.barriers + 8 * static_cast<std::uint32_t>(stage);
}

// The products of a stage's block are done.
__device__ __forceinline__ std::uint32_t empty_barrier(const Params& p, std::uint32_t shared, int stage) {
    return full_barrier(p, shared, p.stages + stage);
}

__device__ __forceinline__ bool within(int at, int size) {
    return static_cast<unsigned>(at) < static_cast<unsigned>(size);
}

// Bit r * 3 + q: whether tap (r, q) of grid position m reads a pixel inside the image.
__device__ __forceinline__ std::uint32_t weight_mask(const Plan& plan, int dilation, int m) {
    if (m >= positions(plan)) return 0;
    const Position at = position_of(plan, m);
    const int h = at.row * plan.source_stride - dilation;
    const int w = at.column * plan.source_stride - dilation;
    std::uint32_t columns = 0;
    std::uint32_t mask = 0;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
        columns |= static_cast<std::uint32_t>(within(w + q * dilation, plan.source_w)) << q;
    }
#pragma unroll
    for (int r = 0; r < 3; ++r) {
        mask |= within(h + r * dilation, plan.source_h) ? columns << 3 * r : 0;
    }
    return mask;
}

// One thread of the warpgroup that brings x and dy. Of each block it copies, and then forms in place, one chunk of
// kRows rows, kRowStep apart.
template <class T>
struct Producer {
    static constexpr int kRows = kPositions * kRowChunks / kGroup;
    static constexpr int kRowStep = kPositions / kRows;
    static constexpr std::uint32_t kRowStepBytes = kRowStep * kRowBytes;

    const Params& p;
    const WgradParams& problem;
    const Share& share;
    std::uint32_t shared;
    int thread;
    int row;                    // its first of a block
    int c, k;                   // first channel and filter of its chunk
    std::uint32_t own;          // its first chunk of the block at 0
    std::uint32_t bits[kRows];  // of dy's mask, of the block that is formed next
    Constants<T> x_constants, dy_constants;

    __device__ __forceinline__ Producer(const Params& params, const Share& given, std::uint32_t memory, int index)
        : p(params), problem(params.problem), share(given), shared(memory), thread(index) {
        const int chunk = thread % kRowChunks;
        row = thread / kRowChunks;
        c = share.c + chunk * kChunk<T>;
        k = share.k + chunk * kChunk<T>;
        own = shared + swizzled(row, chunk);
        x_constants = constants_of<T>(problem.x, c);
        dy_constants = constants_of<T>(problem.dy, k);
        load_bits(0);
    }

    __device__ __forceinline__ std::uint32_t x_at(int step) const {
        return own + p.x + (static_cast<std::uint32_t>(step) * kBlockBytes & (p.ring - 1));
    }

    __device__ __forceinline__ std::uint32_t dy_at(int stage) const {
        return own + static_cast<std::uint32_t>(stage * kBlockBytes);
    }

    // The pixels of the thread's rows of the block that begins with grid position `first`, -1 for none: where the
    // tensor's pixels are the grid,
    __device__ __forceinline__ void number_pixels(int first, int (&pixels)[kRows]) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int m = first + row + i * kRowStep;
            pixels[i] = within(m, positions(problem.plan)) ? m : -1;
        }
    }

    // and of a fill. Eight threads share a row, and the work: a lane finds the pixel of one of the warp's 16 rows.
    __device__ __forceinline__ void find_pixels(const Fill& fill, int first, int (&pixels)[kRows]) const {
        constexpr int kWarpRows = 32 / kRowChunks;  // next to each other
        const int lane = thread % 32;
        const int mine = thread / 32 * kWarpRows + lane % kWarpRows + lane / kWarpRows % kRows * kRowStep;
        const float pixel = bit_cast<float>(source_pixel(problem.plan, fill, first + mine));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            pixels[i] = bit_cast<int>(shuffle(pixel, i * kWarpRows + lane / kRowChunks));
        }
    }

    __device__ __forceinline__ void copy(const void* tensor, int channels, int channel, const int (&pixels)[kRows],
                                         std::uint32_t to) const {
        const bool inside = channel < channels;
        const T* const from = static_cast<const T*>(tensor) + (inside ? channel : 0);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const std::int64_t at = static_cast<std::int64_t>(max(pixels[i], 0)) * channels;
            cp_async16(to + i * kRowStepBytes, from + at, inside && pixels[i] >= 0);
        }
    }

    __device__ __forceinline__ void copy_x(int step) const {
        const Plan& plan = problem.plan;
        std::uint32_t to = x_at(step);
        for (int f = 0; f < plan.fills; ++f, to += p.ring) {
            const int first = share.first + plan.fill[f].lo + step * kPositions;
            int pixels[kRows];
            if (p.x_is_grid) {
                number_pixels(first, pixels);
            } else {
                find_pixels(plan.fill[f], first, pixels);
            }
            copy(problem.x.values, problem.c, c, pixels, to);
        }
    }

    __device__ __forceinline__ void copy_dy(int block, int stage) const {
        const int first = share.first + block * kPositions;
        int pixels[kRows];
        number_pixels(first, pixels);
        copy(problem.dy.values, problem.k, k, pixels, dy_at(stage));
        if (problem.dy.partner != nullptr) copy(problem.dy.partner, problem.k, k, pixels, dy_at(stage) + p.partner);
        if (thread >= kPositions) return;
        const std::uint32_t mask = weight_mask(problem.plan, p.dilation, first + thread);
        store_shared(shared + p.masks + 2 * static_cast<std::uint32_t>(stage * kPositions + thread),
                     static_cast<std::uint16_t>(mask));
    }

    // Bits are asked for a block early and left as they come, so that no thread waits for them.
    __device__ __forceinline__ void load_bits(int block) {
        const Mask& mask = problem.dy.mask;
        std::int64_t element[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int m = share.first + block * kPositions + row + i * kRowStep;
            const bool inside = m < positions(problem.plan) && k < problem.k;
            element[i] = inside ? static_cast<std::int64_t>(m) * problem.k + k : 0;
        }
        if (mask.sign == Sign::kBits) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                bits[i] = static_cast<const std::uint8_t*>(mask.data)[element[i] / kChunk<T>];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                bits[i] = mask_bits<T>(mask, element[i], kChunk<T>, true);
            }
        }
    }

    __device__ __forceinline__ void form(const Operand& operand, const Constants<T>& constants,
                                         const std::uint32_t (&passes)[kRows], std::uint32_t at) const {
        uint4 values[kRows], partner[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            values[i] = load_shared16(at + i * kRowStepBytes);
            partner[i] = operand.partner != nullptr ? load_shared16(at + p.partner + i * kRowStepBytes) : uint4{};
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            store_shared16(at + i * kRowStepBytes, form_chunk<T>(operand, constants, values[i], partner[i], passes[i]));
        }
    }

    __device__ __forceinline__ void form_x(int step) const {
        if (is_plain(problem.x)) return;
        Operand activated = problem.x;
        activated.form = Form::kActivated;  // plan_sm90_wgrad() takes no other, and no partner: the compiler may know
        activated.partner = nullptr;
        std::uint32_t at = x_at(step);
        for (int f = 0; f < problem.plan.fills; ++f, at += p.ring) {
            form(activated, x_constants, bits, at);
        }
    }

    __device__ __forceinline__ void form_dy(int stage) const {
        if (is_plain(problem.dy)) return;
        constexpr std::uint32_t kAll[kRows] = {~0u, ~0u, ~0u, ~0u};
        Operand gradient = problem.dy;
        gradient.form = Form::kGradient;
        if (gradient.mask.sign == Sign::kNone) {
            form(gradient, dy_constants, kAll, dy_at(stage));
        } else {
            form(gradient, dy_constants, bits, dy_at(stage));
        }
    }

    // Copies run `ahead` steps before what is formed and handed over.
    __device__ __forceinline__ void run() {
        const int steps = share.blocks + p.lead;
        const int ahead = min(kMaxAhead, p.stages - 1);
        Turn copied, formed;
        for (int step = 0; step < steps + ahead; ++step) {
            if (step >= ahead) {
                const int block = step - ahead - p.lead;
                if (ahead == kMaxAhead) {
                    cp_async_wait<kMaxAhead - 1>();
                } else {
                    cp_async_wait<0>();
                }
                form_x(step - ahead);
                if (block >= 0) {
                    form_dy(formed.stage);
                    proxy_fence();
                    warp_sync();
                    if (thread % 32 == 0) barrier_arrive(full_barrier(p, shared, formed.stage));
                    formed.advance(p.stages);
                    load_bits(block + 1);
                }
            }
            if (step < steps) {
                const int block = step - p.lead;
                if (block >= 0) barrier_wait(empty_barrier(p, shared, copied.stage), copied.parity ^ 1);
                copy_x(step);
                if (block >= 0) {
                    copy_dy(block, copied.stage);
                    copied.advance(p.stages);
                }
            }
            cp_async_commit();
        }
    }
};

}  // namespace sm90_wgrad

}  // namespace resnet_fused::conv3x3
