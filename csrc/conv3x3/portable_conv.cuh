// fprop and dgrad of the 3x3 convolution by mma.sync, for sm_80 and later.
//
//     out[pixel(m)][n] = sum over taps t and channels k of  source[source pixel of (m, t)][k] * w[t][k][n]
//
// source (source pixels, Ks), formed while it is read (problem.h); weight (K, 3, 3, C / groups); out (target pixels,
// Kt). The product's rows m are grid positions, its columns target channels; geometry.h says which pixels a tap reads.
// Work: a program has one n-tile of kColumns target channels and every programs_m-th m-tile of kRows positions. It
// walks
//     over blocks of 128 bytes of source channels; for each it fills shared memory (one fill for nine taps where the
//     feed is kHalo) and multiplies with one tile of weights per tap.
// Shared memory: `buffers` fills of kRows + extra rows, one less for the partner of dy = a*dz + b*y + c, `stages` tiles
// of
//     weights, a row of zeros. All is brought by cp.async, fills `buffers` - 1 and weights `stages` - 1 ahead.
// Bytes: source (kRows + extra) / kRows times per n-tile (im2col: nine times), from the second-level cache but once;
// the
//     weights once per program and m-tile, from there too.
// Numerics: fp32 accumulation; fp32 operands as three TF32 products of their high and low parts, or as one.

#pragma once

#include "common/launch.h"
#include "conv3x3/epilogue.cuh"
#include "conv3x3/launch.h"
#include "conv3x3/operand.cuh"
#include "conv3x3/tf32.cuh"
#include "conv3x3/walk.cuh"

namespace resnet_fused::conv3x3 {

template <int kRowsOfTile, int kColumnsOfTile, int kWarpsM, int kWarpsN, int kBlocks>
struct Tile {
    static constexpr int kRows = kRowsOfTile;
    static constexpr int kColumns = kColumnsOfTile;
    static constexpr int kWarpRows = kWarpsM;  // warps along the rows
    static constexpr int kWarpColumns = kWarpsN;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kFm = kRows / kWarpsM / 16;  // fragments of a warp
    static constexpr int kFn = kColumns / kWarpsN / 8;
    static constexpr int kOnMultiprocessor = kBlocks;  // programs that registers are kept for
};

// Byte offsets in shared memory.
struct Layout {
    std::uint32_t fill_bytes;
    std::uint32_t partners;
    std::uint32_t weights;
    std::uint32_t zeros;
    std::uint32_t states;
    std::uint32_t vectors;
    std::uint32_t flag;
    std::uint32_t bytes;
};

inline Layout layout_of(int tile_rows, int columns, int warp_rows, int extra, bool partner, int buffers, int stages) {
    Layout layout;
    layout.fill_bytes = static_cast<std::uint32_t>((tile_rows + extra + 7) / 8 * 8 * kRowBytes);
    layout.partners = layout.fill_bytes * buffers;
    layout.weights = layout.partners + (partner ? layout.fill_bytes * (buffers - 1) : 0);
    layout.zeros = layout.weights + static_cast<std::uint32_t>(stages * columns * kRowBytes);
    layout.states = layout.zeros + kRowBytes;
    layout.vectors = layout.states + static_cast<std::uint32_t>(warp_rows * columns * 2 * sizeof(float));
    layout.flag = layout.vectors + vector_bytes<Direction::kDgrad>(columns);
    layout.bytes = layout.flag + 16;
    return layout;
}

struct PortableParams {
    ConvParams conv;
    Layout layout;
    int buffers;
    int stages;
};

// The kernel's launch, for one file a type (portable_conv_<type>.cu): they compile side by side.
template <Type kType>
void launch_portable_conv(const Launch& launch, Direction direction, const PortableParams& params, cudaStream_t stream);

template <Type kType>
int portable_conv_on_multiprocessor(const Config& config, Direction direction, std::size_t shared);

// --- weights ---------------------------------------------------------------------------------------------------------

// 16 bytes of the weight: filter k of `filters`, channels c and on of `channels`, of which those of k's group exist;
// zeros elsewhere.
template <class T>
__device__ __forceinline__ void copy_weight(const ConvParams& p, std::uint32_t to, int k, int filters, int c,
                                            int channels, int per_group, int tap) {
    const T* const weight = static_cast<const T*>(p.weight);
    const int inner = p.weight_inner;
    const int start = inner == channels ? 0 : k / per_group * inner;  // first channel of the filter's group
    const std::int64_t row = (static_cast<std::int64_t>(k) * kTaps + tap) * inner;
    if (p.vector_weight) {
        const bool valid = k < filters && c < channels && c >= start && c < start + inner;
        cp_async16(to, weight + (valid ? row + c - start : 0), valid);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < kChunk<T>; ++i) {
        const bool valid = k < filters && c + i < channels && c + i >= start && c + i < start + inner;
        store_shared(to + i * static_cast<std::uint32_t>(sizeof(T)),
                     valid ? weight[row + c + i - start] : from_float<T>(0.0f));
    }
}

// The weights of one tap: for fprop a row of 128 bytes (source channels) for each column, for dgrad a row (target
// channels) for each source channel, 128 bytes of columns after 128 bytes.
template <class T, Direction kDirection, int kColumns, int kThreads>
__device__ __forceinline__ void copy_weights(const ConvParams& p, std::uint32_t to, int column, int channel, int tap) {
    constexpr int kItems = kColumns * kRowChunks;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int first = 0; first < kItems; first += kThreads) {
        const int item = first + thread;
        if (kItems % kThreads != 0 && item >= kItems) return;
        const int chunk = item % kRowChunks;
        const int row = item / kRowChunks;
        if constexpr (kDirection == Direction::kFprop) {
            copy_weight<T>(p, to + swizzled(row, chunk), column + row, p.target_channels, channel + chunk * kChunk<T>,
                           p.source.channels, p.group_target, tap);
        } else {
            const int part = row / kBlock<T>;
            copy_weight<T>(p, to + swizzled(row, chunk), channel + row % kBlock<T>, p.source.channels,
                           column + part * kBlock<T> + chunk * kChunk<T>, p.target_channels, p.group_source, tap);
        }
    }
}

// --- products --------------------------------------------------------------------------------------------------------

// b0 and b1 of two neighbouring fragments (16 columns), of step `step` (32 bytes of source channels).
template <class T, Direction kDirection>
__device__ __forceinline__ void load_weights(std::uint32_t weights, int column, int step, int lane,
                                             std::uint32_t (&b)[4]) {
    if constexpr (kDirection == Direction::kFprop) {
        const int row = column + lane % 8 + 8 * (lane / 16);
        ldmatrix_x4(b, weights + swizzled(row, 2 * step + lane / 8 % 2));
    } else if constexpr (sizeof(T) == 2) {
        const int chunk = column / kChunk<T> + lane / 16;
        const int part = chunk / kRowChunks;
        ldmatrix_x4_trans(b, weights + swizzled(part * kBlock<T> + 16 * step + lane % 16, chunk % kRowChunks));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = column + 8 * (i / 2) + lane / 4;
            const int row = n / kBlock<T> * kBlock<T> + 8 * step + lane % 4 + 4 * (i % 2);
            const int chunk = n % kBlock<T> / kChunk<T>;
            b[i] = load_shared<std::uint32_t>(weights + swizzled(row, chunk) + n % kChunk<T> * 4);
        }
    }
}

// d += a * b of one fragment.
template <Type kType>
__device__ __forceinline__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
    if constexpr (kType == Type::kFp16 || kType == Type::kBf16) {
        mma_16816<Element<kType>>(d, a, b0, b1);
    } else {
        const Split b[2] = {split(b0), split(b1)};
        std::uint32_t high[4];
        std::uint32_t low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Split part = split(a[i]);
            high[i] = part.high;
            low[i] = part.low;
        }
        if constexpr (kType == Type::kFp32) {
            mma_1688_tf32(d, low, b[0].high, b[1].high);
            mma_1688_tf32(d, high, b[0].low, b[1].low);
        }
        mma_1688_tf32(d, high, b[0].high, b[1].high);
    }
}

// A lane's part in reading the source: of each fragment the row whose address it gives.
template <int kFm>
struct SourceRows {
    std::uint32_t mask[kFm];  // taps of the fill that are inside the image
    int row;                  // of the tile, in the first fragment
    int half;                 // which 16 of a step's 32 bytes
};

// All products of one tap.
template <Type kType, Direction kDirection, int kFm, int kFn>
__device__ __forceinline__ void multiply_tap(float (&acc)[kFm][kFn][4], const SourceRows<kFm>& rows, int tap,
                                             int offset, std::uint32_t fill, std::uint32_t zeros, std::uint32_t weights,
                                             int column, int lane) {
    using T = Element<kType>;
    std::uint32_t base[kFm];
    std::uint32_t key[kFm];
#pragma unroll
    for (int i = 0; i < kFm; ++i) {
        const int row = rows.row + 16 * i + offset;
        const bool inside = rows.mask[i] >> tap & 1;
        base[i] = inside ? fill + static_cast<std::uint32_t>(row * kRowBytes) : zeros;
        key[i] = static_cast<std::uint32_t>((rows.half ^ (row & 7)) << 4);
    }
#pragma unroll
    for (int step = 0; step < kRowChunks / 2; ++step) {
        std::uint32_t a[kFm][4];
#pragma unroll
        for (int i = 0; i < kFm; ++i) {
            ldmatrix_x4(a[i], base[i] + (key[i] ^ static_cast<std::uint32_t>(step << 5)));
        }
#pragma unroll
        for (int j = 0; j < kFn; j += 2) {
            std::uint32_t b[4];
            load_weights<T, kDirection>(weights, column + 8 * j, step, lane, b);
#pragma unroll
            for (int i = 0; i < kFm; ++i) {
                multiply<kType>(acc[i][j], a[i], b[0], b[1]);
                multiply<kType>(acc[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

// A place in a ring.
__device__ __forceinline__ void advance(int& place, int places) {
    place = place + 1 == places ? 0 : place + 1;
}

// Where a fill stands in shared memory.
template <class kTile>
__device__ __forceinline__ Rows rows_of(const PortableParams& params, const FillStep& step, int buffer, int partner) {
    const Fill& fill = params.conv.plan.fill[step.fill];
    Rows rows;
    rows.values = shared_address(shared_memory()) + buffer * params.layout.fill_bytes;
    rows.partner = shared_address(shared_memory()) + params.layout.partners + partner * params.layout.fill_bytes;
    rows.first = step.first_row(params.conv, kTile::kRows) + fill.lo;
    rows.count = kTile::kRows + fill.extra;
    rows.slot = 0;
    rows.slot_mask = -1;
    rows.channel = step.channel;
    return rows;
}

// The fills that are copied ahead.
template <class T, class kTile>
struct FillCopies {
    FillStep step;
    int buffer = 0;
    int partner = 0;

    __device__ __forceinline__ void next(const PortableParams& params, const Program& program) {
        const ConvParams& p = params.conv;
        if (!step.valid(program)) return;
        copy_rows<T>(p.plan, p.plan.fill[step.fill], p.source, rows_of<kTile>(params, step, buffer, partner),
                     threadIdx.x, kTile::kThreads, p.vector_source);
        advance(buffer, params.buffers);
        advance(partner, params.buffers - 1);
        step.advance(p, program, kBlock<T>);
    }
};

// The weights that are copied ahead.
template <class T, Direction kDirection, class kTile>
struct WeightCopies {
    TapStep step;
    int stage = 0;

    __device__ __forceinline__ void next(const PortableParams& params, const Program& program) {
        const ConvParams& p = params.conv;
        if (!step.at.valid(program)) return;
        const int tap = p.plan.tap[p.plan.fill[step.at.fill].first_tap + step.tap].weight;
        const std::uint32_t to =
            shared_address(shared_memory()) + params.layout.weights + stage * kTile::kColumns * kRowBytes;
        copy_weights<T, kDirection, kTile::kColumns, kTile::kThreads>(p, to, program.n * kTile::kColumns,
                                                                      step.at.channel, tap);
        advance(stage, params.stages);
        step.advance(p, program, kBlock<T>);
    }
};

// Forms a fill in place. dy is kept by those tiles of the first class whose fill holds them unshifted: of one n-tile,
// or, as each has the channels of its own groups, of all.
template <class T, class kTile>
__device__ __forceinline__ void form(const PortableParams& params, const Program& program, const FillStep& step,
                                     int buffer, int partner) {
    const ConvParams& p = params.conv;
    if (is_plain(p.source)) return;
    const Fill& fill = p.plan.fill[step.fill];
    const bool mine = program.n == 0 || p.group_source < p.source.channels;
    const bool keeps = mine && step.cls == 0 && holds_tile(p.plan, fill);
    form_rows<T>(p.plan, fill, p.source, rows_of<kTile>(params, step, buffer, partner), threadIdx.x, kTile::kThreads,
                 p.vector_source, keeps ? p.backward.dy : nullptr, -fill.lo, kTile::kRows);
}

// Waits for this thread's copies of the weights of a step; of all else too where `all`.
__device__ __forceinline__ void wait_for_copies(int stages, bool all) {
    if (all || stages == 2) {
        cp_async_wait<0>();
    } else if (stages == 3) {
        cp_async_wait<1>();
    } else {
        cp_async_wait<2>();
    }
}

template <Type kType, Direction kDirection, class kTile>
__global__ void __launch_bounds__(kTile::kThreads, kTile::kOnMultiprocessor)
    conv3x3_kernel(const __grid_constant__ PortableParams params) {
    using T = Element<kType>;
    constexpr int kFm = kTile::kFm;
    constexpr int kFn = kTile::kFn;
    const ConvParams& p = params.conv;
    const Layout& layout = params.layout;
    const Program program = program_of(p, blockIdx.x, kTile::kColumns, kChunk<T>);
    const std::uint32_t shared = shared_address(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const int warp_row = thread / 32 / kTile::kWarpColumns;
    const int warp_column = thread / 32 % kTile::kWarpColumns;
    for (std::uint32_t at = layout.zeros + thread * 16u; at < layout.vectors; at += kTile::kThreads * 16u) {
        store_shared16(shared + at, uint4{0, 0, 0, 0});
    }
    load_vectors<kDirection>(p, program.n, kTile::kColumns, shared + layout.vectors, thread, kTile::kThreads);
    block_sync();

    FillStep step = {};
    step.begin(p, program, program.m);
    FillCopies<T, kTile> fills{step};
    WeightCopies<T, kDirection, kTile> weights{{step, 0}};
    for (int i = 0; i < params.buffers - 1; ++i) {
        fills.next(params, program);
    }
    for (int i = 0; i < params.stages - 1; ++i) {
        weights.next(params, program);
        cp_async_commit();
    }

    SourceRows<kFm> rows{{}, warp_row * 16 * kFm + lane % 16, lane / 16};
    const std::uint32_t state = state_of(shared + layout.states, warp_row * kTile::kColumns + warp_column * 8 * kFn);
    int rows_done = 0;
    int buffer = 0;
    int partner = 0;
    int stage = 0;
    int taps_before = 0;  // of the fill before: its steps have brought this one, if they were enough
    for (int tile = program.m; tile < program.tiles; tile += p.programs_m) {
        const int cls = tile / p.tiles_m;
        const int first_row = (tile - cls * p.tiles_m) * kTile::kRows;
        float acc[kFm][kFn][4] = {};
        while (step.valid(program) && step.tile == tile) {
            const Fill& fill = p.plan.fill[step.fill];
            if (step.channel == program.channels.begin || p.plan.cls[cls].fills > 1) {
#pragma unroll
                for (int i = 0; i < kFm; ++i) {
                    rows.mask[i] = tap_mask(p.plan, fill, first_row + rows.row + 16 * i);
                }
            }
            for (int tap = 0; tap < fill.taps; ++tap) {
                wait_for_copies(params.stages, tap == 0 && taps_before * (params.buffers - 1) < params.stages - 1);
                if (tap == 0) form<T, kTile>(params, program, step, buffer, partner);
                block_sync();
                weights.next(params, program);
                if (tap == 0) fills.next(params, program);
                cp_async_commit();
                const int offset = p.plan.tap[fill.first_tap + tap].shift - fill.lo;
                multiply_tap<kType, kDirection>(
                    acc, rows, tap, offset, shared + buffer * layout.fill_bytes, shared + layout.zeros,
                    shared + layout.weights + stage * kTile::kColumns * kRowBytes, warp_column * 8 * kFn, lane);
                advance(stage, params.stages);
            }
            taps_before = fill.taps;
            advance(buffer, params.buffers);
            advance(partner, params.buffers - 1);
            step.advance(p, program, kBlock<T>);
        }
        finish_tile<kDirection, T>(p, p.plan.cls[cls], acc, first_row + warp_row * 16 * kFm,
                                   (program.n * kTile::kWarpColumns + warp_column) * 8 * kFn,
                                   shared + layout.vectors + vector_bytes<kDirection>(warp_column * 8 * kFn), state,
                                   rows_done, p.vector_target);
    }
    cp_async_wait<0>();
    finish_program<kDirection, kTile::kColumns>(p, program.m, program.n, kTile::kRows, shared + layout.states,
                                                kTile::kWarpRows, shared + layout.flag, thread, kTile::kThreads,
                                                [] { block_sync(); });
}

}  // namespace resnet_fused::conv3x3
