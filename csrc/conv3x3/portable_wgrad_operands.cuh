// What a block of portable_wgrad.cu has in shared memory, and how x and dy come there.

#pragma once

#include "conv3x3/operand.cuh"

namespace resnet_fused::conv3x3::portable_wgrad {

constexpr int kWarps = 12;
constexpr int kThreads = 32 * kWarps;

struct Params {
    WgradParams problem;
    int rows;       // positions of a block of the reduction
    int stages;     // such blocks of dy
    int slot_mask;  // each fill's ring of x has slot_mask + 1 rows, a power of two
    int x_threads;  // that copy and form x; the others have dy
    bool vector_partial;
    std::uint32_t partner, x, zeros, share, constants, masks;  // offsets in shared memory; dy is at 0
};

constexpr int kWarpTaps = 3;
constexpr int kThirds = kTaps / kWarpTaps;
constexpr int kMaskBytes = 2;

// Where shared memory says which taps of a third are inside the image, a bit for each; `row` counts through the stages.
__device__ __forceinline__ std::uint32_t mask_offset(const Params& p, int third, int row) {
    return p.masks + static_cast<std::uint32_t>((third * p.stages * p.rows + row) * kMaskBytes);
}

// A value that all lanes have, told to the compiler: it can rest in a register that the warp shares.
__device__ __forceinline__ int uniform(int value) {
    return bit_cast<int>(shuffle(bit_cast<float>(value), 0));
}

// What a block of the grid computes. It rests in shared memory: the registers are the accumulators'.
struct Share {
    int k, c;  // first filter and channel
    int split;
    int blocks;  // of positions

    __device__ __forceinline__ int first(const Params& p) const { return split * p.problem.blocks_per_split * p.rows; }
};

// `blocks` is -1 where the filters' groups reach no such channels.
template <class T>
__device__ __forceinline__ Share share_of(const Params& p) {
    const WgradParams& problem = p.problem;
    const int tiles = problem.tiles_k * problem.tiles_c;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    Share share;
    share.k = tile / problem.tiles_c * kBlock<T>;
    const Channels reached =
        source_channels(share.k, min(share.k + kBlock<T>, problem.k), problem.group_k, problem.group_c, kChunk<T>);
    share.c = reached.begin + tile % problem.tiles_c * kBlock<T>;
    share.split = static_cast<int>(blockIdx.x) / tiles;
    const int blocks = min(problem.blocks_per_split, problem.blocks - share.split * problem.blocks_per_split);
    share.blocks = share.c < reached.end ? blocks : -1;
    return share;
}

__device__ __forceinline__ void keep_share(const Share& share, std::uint32_t to) {
    store_shared16(to, {static_cast<std::uint32_t>(share.k), static_cast<std::uint32_t>(share.c),
                        static_cast<std::uint32_t>(share.split), static_cast<std::uint32_t>(share.blocks)});
}

__device__ __forceinline__ Share kept_share(std::uint32_t from) {
    const uint4 kept = load_shared16(from);
    return {static_cast<int>(kept.x), static_cast<int>(kept.y), static_cast<int>(kept.z), static_cast<int>(kept.w)};
}

// The constants of x's and of dy's chunks rest there too, [a, b, c][kChunk / 4][chunk][4] of each; neighbouring chunks
// are in neighbouring banks.
template <class T>
constexpr int kConstantsBytes = 3 * kBlock<T> * static_cast<int>(sizeof(float));

template <class T>
__device__ __forceinline__ void keep(std::uint32_t to, const float (&values)[kChunk<T>]) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
        store_shared_float(to + static_cast<std::uint32_t>(i / 4 * kRowBytes + i % 4 * 4), values[i]);
    }
}

template <class T>
__device__ __forceinline__ void recall(std::uint32_t from, float (&values)[kChunk<T>]) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; i += 4) {
        const uint4 four = load_shared16(from + i / 4 * kRowBytes);
        values[i] = bit_cast<float>(four.x);
        values[i + 1] = bit_cast<float>(four.y);
        values[i + 2] = bit_cast<float>(four.z);
        values[i + 3] = bit_cast<float>(four.w);
    }
}

// One thread's part in bringing x or dy.
template <class T>
struct Feeder {
    static constexpr std::uint32_t kArray = kConstantsBytes<T> / 3;

    const Params& p;
    std::uint32_t shared;
    bool has_x;
    int thread;  // of `threads` with the same operand
    int threads;

    __device__ __forceinline__ Feeder(const Params& params, const Share& share, std::uint32_t memory, int warp,
                                      int lane)
        : p(params), shared(memory), has_x(32 * warp < params.x_threads) {
        thread = 32 * warp + lane - (has_x ? 0 : p.x_threads);
        threads = has_x ? p.x_threads : kThreads - p.x_threads;
        if (thread >= kRowChunks) return;
        const int channel = (has_x ? share.c : share.k) + thread * kChunk<T>;
        const Constants<T> constants = constants_of<T>(has_x ? p.problem.x : p.problem.dy, channel);
        const std::uint32_t at = constants_address();
        keep<T>(at, constants.a);
        keep<T>(at + kArray, constants.b);
        keep<T>(at + 2 * kArray, constants.c);
    }

    __device__ __forceinline__ std::uint32_t constants_address() const {
        const std::uint32_t operand = has_x ? 0 : kConstantsBytes<T>;
        return shared + p.constants + operand + static_cast<std::uint32_t>(thread % kRowChunks * 16);
    }

    __device__ __forceinline__ Share share() const { return kept_share(shared + p.share); }

    // The rows of x that block `block` is the first to read.
    __device__ __forceinline__ Rows x_rows(const Share& share, int fill, int block) const {
        const Fill& of = p.problem.plan.fill[fill];
        const int before = block == 0 ? 0 : block * p.rows + of.extra;
        Rows rows;
        rows.values = shared + p.x + static_cast<std::uint32_t>(fill * (p.slot_mask + 1) * kRowBytes);
        rows.partner = 0;
        rows.first = share.first(p) + of.lo + before;
        rows.count = block == 0 ? p.rows + of.extra : p.rows;
        rows.slot = before;
        rows.slot_mask = p.slot_mask;
        rows.channel = share.c;
        return rows;
    }

    __device__ __forceinline__ Rows dy_rows(const Share& share, int block, int stage) const {
        const std::uint32_t at = shared + static_cast<std::uint32_t>(stage * p.rows * kRowBytes);
        return {at, at + p.partner, share.first(p) + block * p.rows, p.rows, 0, -1, share.k};
    }

    // Begins the copies of a block into a stage, and notes which taps of its positions are inside the image.
    __device__ __forceinline__ void copy(int block, int stage) const {
        const WgradParams& problem = p.problem;
        const Plan& plan = problem.plan;
        const Share share = this->share();
        if (block < share.blocks && has_x) {
            if (thread < p.rows) {
                const Fill all{0, 0, 0, 0, 0, kTaps};
                const std::uint32_t mask = tap_mask(plan, all, share.first(p) + block * p.rows + thread);
#pragma unroll
                for (int third = 0; third < kThirds; ++third) {
                    store_shared(shared + mask_offset(p, third, stage * p.rows + thread),
                                 static_cast<std::uint16_t>(mask >> third * kWarpTaps & ((1 << kWarpTaps) - 1)));
                }
            }
            for (int fill = 0; fill < plan.fills; ++fill) {
                copy_rows<T>(FillPixels{plan, plan.fill[fill]}, problem.x, x_rows(share, fill, block), thread, threads,
                             problem.vector_x);
            }
        } else if (block < share.blocks) {
            copy_rows<T>(GridPixels{positions(plan)}, problem.dy, dy_rows(share, block, stage), thread, threads,
                         problem.vector_dy);
        }
        cp_async_commit();
    }

    // Waits for this thread's copies of a block, after which stages - 2 were begun, and forms them. What is said again
    // of the operands here, plan_portable_wgrad() has made sure of: the compiler leaves out the other forms.
    __device__ __forceinline__ void form(int block, int stage) const {
        if (p.stages == 2) {
            cp_async_wait<0>();
        } else if (p.stages == 3) {
            cp_async_wait<1>();
        } else {
            cp_async_wait<2>();
        }
        Operand x = p.problem.x;
        Operand dy = p.problem.dy;
        const Share share = this->share();
        if (block < 0 || block >= share.blocks || is_plain(has_x ? x : dy)) return;
        x.form = Form::kActivated;
        x.mask.sign = Sign::kNone;
        x.partner = nullptr;
        dy.form = Form::kGradient;
        const GridPixels pixels{positions(p.problem.plan)};  // of dy's mask; x has none
        const std::uint32_t at = constants_address();
        Constants<T> constants;
        recall<T>(at, constants.a);
        recall<T>(at + 2 * kArray, constants.c);
        if (has_x) {
            for (int fill = 0; fill < p.problem.plan.fills; ++fill) {
                form_rows<T>(pixels, x, constants, x_rows(share, fill, block), thread, threads, p.problem.vector_x,
                             nullptr, 0, 0);
            }
        } else {
            recall<T>(at + kArray, constants.b);
            form_rows<T>(pixels, dy, constants, dy_rows(share, block, stage), thread, threads, p.problem.vector_dy,
                         nullptr, 0, 0);
        }
    }
};

}  // namespace resnet_fused::conv3x3::portable_wgrad
