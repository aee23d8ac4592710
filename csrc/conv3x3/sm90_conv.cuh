// fprop and dgrad of the 3x3 convolution on Hopper, by wgmma.
//
//     out[pixel(m)][n] = sum over taps t and channels k of  source[source pixel of (m, t)][k] * w[t][k][n]
//
// source (source pixels, Ks), formed while it is read (problem.h); weight (K, 3, 3, C); out (target pixels, Kt). The
// product's rows m are grid positions, its columns target channels; geometry.h says which pixels a tap reads.
// Work: a program has one n-tile of kColumns target channels and every programs_m-th m-tile of kRows positions. One
//     warpgroup brings data (sm90_pipeline.cuh, sm90_form.cuh), the others, consumers, multiply and write results: each
//     warp 16 * kFm rows of the tile by all columns, 64 source channels of one tap in a step. The source's rows come
//     to registers by ldmatrix, each lane giving the address of its row, shifted as the tap asks, or that of a row of
//     zeros outside the image; weights are read by wgmma where they stand.
// Turns: a consumer begins a tile some steps after the one before it, so that one multiplies while another writes its
//     results.
// Bytes: source (kRows + extra) / kRows times per n-tile (im2col: nine times), from the second-level cache but once;
//     the weights once per program where they are resident, else once per m-tile, from there too.
// Numerics: fp32 accumulation, of one product after the other, in the order of channel blocks, fills and taps.

#pragma once

#include "common/launch.h"
#include "conv3x3/epilogue.cuh"
#include "conv3x3/launch.h"
#include "conv3x3/sm90_form.cuh"

namespace resnet_fused::conv3x3 {

constexpr int kWarps = 4;  // of a warpgroup
constexpr int kWarpgroup = 32 * kWarps;

template <int kWarpgroups, int kFragments, int kColumnsOfTile>
struct WgmmaTile {
    static constexpr int kConsumers = kWarpgroups;
    static constexpr int kFm = kFragments;  // of 16 rows, of a warp
    static constexpr int kColumns = kColumnsOfTile;
    static constexpr int kFn = kColumns / 8;
    static constexpr int kRows = kConsumers * kWarps * 16 * kFm;
    static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
    // Of a thread; all together what the block is launched with, 168 (4 warpgroups: 128) for each thread. 2 * 64
    // accumulators leave the least to the producers.
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 144 : kFm * kColumns == 256 ? 216 : 200;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 80 : kFm * kColumns == 256 ? 72 : 104;
};

// What a step multiplies.
struct Step {
    int tap;             // of the class: its bit in the masks
    int offset;          // from a row of the tile to that of the fill
    std::uint32_t fill;  // shared addresses
    std::uint32_t weights;
    std::uint32_t full;  // barrier: the weights have come
    std::uint32_t parity;
};

// The products of one step, in two units: while one is under way, the other's rows come to registers. `done` is the
// barrier to arrive at when the step before has been multiplied, or 0. The last unit is left under way.
template <class T, Direction kDirection, class kTile>
__device__ __forceinline__ void multiply_step(float (&acc)[kTile::kFm][kTile::kFn][4],
                                              const std::uint32_t (&mask)[kTile::kFm], const Step& step,
                                              std::uint32_t zeros, int own_row, int lane, std::uint32_t done) {
    constexpr bool kFprop = kDirection == Direction::kFprop;
    constexpr int kUnits = 2;
    constexpr int kSlices = kTile::kFm == kUnits ? 4 : 2;  // of 16 channels, of a unit
    constexpr std::uint32_t kSliceBytes = kFprop ? 32 : 16 * kRowBytes;
    constexpr std::uint32_t kLeading = kWeightRows * kRowBytes;
    constexpr std::uint32_t kStride = 8 * kRowBytes;
    const int row = own_row + step.offset;
    const auto key = static_cast<std::uint32_t>((lane / 16 ^ (row & 7)) << 4);
    std::uint32_t a[kUnits][kSlices][4];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        const int i = kTile::kFm == kUnits ? unit : 0;
        const int first = kTile::kFm == kUnits ? 0 : unit * kSlices;
        const bool inside = mask[i] >> step.tap & 1;
        const std::uint32_t base = inside ? step.fill + static_cast<std::uint32_t>((row + 16 * i) * kRowBytes) : zeros;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
            ldmatrix_x4(a[unit][s], base + (key ^ static_cast<std::uint32_t>((first + s) << 5)));
        }
        if (unit == 0) barrier_wait(step.full, step.parity);
        wgmma_fence(a[unit]);
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
            wgmma<T, kTile::kColumns, !kFprop>(
                acc[i], a[unit][s], matrix_descriptor(step.weights + (first + s) * kSliceBytes, kLeading, kStride));
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (unit == 0 && done != 0 && lane == 0) barrier_arrive(done);
    }
}

// One warp of a consumer.
template <class T, Direction kDirection, class kTile>
__device__ __forceinline__ void multiply(const ConvParams& p, const Places& places, const Program& program) {
    constexpr int kFm = kTile::kFm;
    constexpr int kColumns = kTile::kColumns;
    const Plan& plan = p.plan;
    const ConvPipeline& line = places.line;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 - kWarps;
    const int consumer = warp / kWarps;
    const int warp_row = warp * 16 * kFm;
    const int own_row = warp_row + lane % 16;
    const std::uint32_t state = state_of(places.shared + line.states, warp * kColumns);
    const std::uint32_t next_turn = places.turn(consumer + 1 == kTile::kConsumers ? 0 : consumer + 1);

    Ring fills;
    Ring weights;
    std::uint32_t turn = consumer == 0;  // the first consumer's first turn is there
    int rows_done = 0;
    for (int tile = program.m; tile < program.tiles; tile += p.programs_m) {
        const Class& cls = plan.cls[tile / p.tiles_m];
        const int m = tile % p.tiles_m * kTile::kRows + warp_row;
        int taps = 0;
        int first_tap = 0;
        int first_taps = 0;  // of the first fill
        std::uint32_t mask[kFm] = {};
        for (int f = cls.first_fill; f < cls.first_fill + cls.fills; ++f) {
#pragma unroll
            for (int i = 0; i < kFm; ++i) {
                mask[i] |= tap_mask(plan, plan.fill[f], m + lane % 16 + 16 * i) << taps;
            }
            if (taps == 0) {
                first_tap = plan.fill[f].first_tap;
                first_taps = plan.fill[f].taps;
            }
            taps += plan.fill[f].taps;
        }
        int lead = min(line.lead, min(first_taps, (taps + 1) / 2));  // steps until the next's turn
        if (line.lead > 0) {
            barrier_wait(places.turn(consumer), turn);
            turn ^= 1;
            warp_sync();
            if (lead == 0 && lane == 0) barrier_arrive(next_turn);
        }
        float acc[kFm][kTile::kFn][4] = {};
        wgmma_fence(acc);
        std::uint32_t done = 0;
        for (int channel = program.channels.begin; channel < program.channels.end; channel += kWeightRows) {
            for (int f = cls.first_fill; f < cls.first_fill + cls.fills; ++f) {
                const Fill fill = plan.fill[f];
                const int resident = resident_stage(plan, channel, 0);
                int shift = plan.tap[fill.first_tap].shift;
                barrier_wait(places.fill_full(fills.place), fills.phase);
                for (int tap = fill.first_tap; tap < fill.first_tap + fill.taps; ++tap) {
                    const int stage = line.resident ? resident + tap : weights.place;
                    const int offset = shift - fill.lo;
                    shift = plan.tap[min(tap + 1, kTaps - 1)].shift;
                    const Step step{tap - first_tap,
                                    offset,
                                    places.fill(fills.place),
                                    places.weights(stage, kColumns),
                                    places.weights_full(stage),
                                    line.resident ? 0 : weights.phase};
                    multiply_step<T, kDirection, kTile>(acc, mask, step, places.shared + line.zeros, own_row, lane,
                                                        done);
                    if (!line.resident) {
                        done = places.weights_empty(stage);
                        weights.advance(line.stages);
                    }
                    if (--lead == 0 && line.lead > 0 && lane == 0) barrier_arrive(next_turn);
                }
                if (lane == 0) barrier_arrive(places.fill_empty(fills.place));
                fills.advance(line.fills);
            }
        }
        wgmma_wait<0>(acc);
        if (done != 0 && lane == 0) barrier_arrive(done);
        finish_tile<kDirection, T>(p, cls, acc, m, program.n * kColumns, places.shared + line.vectors, state, rows_done,
                                   true);
    }
    for (int stage = 0; line.resident && stage < line.stages; ++stage) {
        barrier_wait(places.weights_full(stage), 0);  // a program may not need all, but must not end before they came
    }
    finish_program<kDirection, kColumns>(p, program.m, program.n, kTile::kRows, places.shared + line.states,
                                         kTile::kConsumers * kWarps, places.shared + line.flag,
                                         static_cast<int>(threadIdx.x) - kWarpgroup, kTile::kConsumers * kWarpgroup,
                                         [] { named_barrier_sync(1, kTile::kConsumers * kWarpgroup); });
}

template <Direction kDirection, class kTile>
__device__ __forceinline__ void prepare(const ConvParams& p, const ConvMaps& maps, const Places& places,
                                        const Program& program) {
    const ConvPipeline& line = places.line;
    for (std::uint32_t at = line.states + threadIdx.x * 16u; at < line.vectors; at += kTile::kThreads * 16u) {
        store_shared16(places.shared + at, uint4{0, 0, 0, 0});
    }
    load_vectors<kDirection>(p, program.n, kTile::kColumns, places.shared + line.vectors, threadIdx.x, kTile::kThreads);
    if (threadIdx.x == 0) {
        constexpr int kReaders = kTile::kConsumers * kWarps;  // each warp releases for itself
        for (int i = 0; i < line.stages; ++i) {
            barrier_init(places.weights_full(i), 1);
            barrier_init(places.weights_empty(i), kReaders);
        }
        for (int i = 0; i < line.fills; ++i) {
            barrier_init(places.fill_full(i), line.direct ? 1 : line.forming);
            barrier_init(places.fill_empty(i), kReaders);
        }
        for (int i = 0; i < line.forming * line.slots; ++i) {
            barrier_init(places.piece_full(i / line.slots, i % line.slots), 1);
        }
        for (int i = 0; i < kTile::kConsumers; ++i) {
            barrier_init(places.turn(i), kWarps);
        }
        barrier_init_fence();
        tma_prefetch(&maps.weight);
        if (p.plan.source_stride == 1) tma_prefetch(&maps.values);
    }
    block_sync();
}

// One warp of the producers.
template <class T, Direction kDirection, class kTile>
__device__ __forceinline__ void produce(const ConvParams& p, const ConvMaps& maps, const Places& places,
                                        const Program& program) {
    const ConvPipeline& line = places.line;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) load_weights<kDirection, kTile>(p, maps, places, program);
    if (line.direct) {
        if (warp == 1 && lane == 0) load_source<kTile>(p, maps, places, program);
        return;
    }
    warp_sync();
    const int forming = warp - (kProducerWarps - line.forming);  // the weights' warp too where they are resident
    if (forming < 0) return;
    FormingWarp<T, kDirection, kTile>{p, maps, places, program, places.pieces(forming), places.notes(forming), lane}
        .run(forming * kPieceRows<kDirection>);
}

template <class T, Direction kDirection, class kTile>
__global__ void __launch_bounds__(kTile::kThreads, 1)
    sm90_conv3x3_kernel(const __grid_constant__ ConvParams p, const __grid_constant__ ConvMaps maps,
                        const __grid_constant__ ConvPipeline line) {
    const Program program = program_of(p, blockIdx.x, kTile::kColumns, kChunk<T>);
    const Places places{line, shared_address(shared_memory())};
    prepare<kDirection, kTile>(p, maps, places, program);
    if (threadIdx.x < kWarpgroup) {
        registers_decrease<kTile::kProducerRegisters>();
        produce<T, kDirection, kTile>(p, maps, places, program);
    } else {
        registers_increase<kTile::kConsumerRegisters>();
        multiply<T, kDirection, kTile>(p, places, program);
    }
}

}  // namespace resnet_fused::conv3x3
