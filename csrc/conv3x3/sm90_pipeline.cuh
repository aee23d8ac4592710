// How data reaches the products of sm90_conv.cuh: what is where in shared memory, and the threads that bring what needs
// no forming (sm90_form.cuh has the others).
//
//     weights  tiles of 64 source channels by kColumns target channels, one a tap, in order of use: a ring; or, where
//              all of an n-tile's weights fit, a place each, loaded once per program (`resident`)
//     fills    a ring of buffers, rows of 128 bytes (geometry.h), read by ldmatrix
//     pieces   some rows of a fill, and of the partner's, before they are formed: a ring for each forming warp
//
// Barriers are pairs: those who read wait for `full`, those who bring the next wait for `empty`.
// A plain operand whose fills are consecutive pixels is copied straight into the fills (`direct`).

#pragma once

#include "common/sm90.h"
#include "conv3x3/operand.cuh"
#include "conv3x3/walk.cuh"

namespace resnet_fused::conv3x3 {

constexpr int kWeightRows = 64;  // source channels of a tile of weights
constexpr int kDirectRows = 32;  // of one copy where the source is `direct`
constexpr int kProducerWarps = 4;
constexpr int kNoteBytes = 48;    // a forming warp's note on a piece, at the end of which
constexpr int kNoteBarrier = 32;  // stands the barrier that the piece has come

// Rows of a piece. Bringing a larger one costs no more; but a gradient's come with the partner's, and more are under
// way where they are smaller.
template <Direction kDirection>
constexpr int kPieceRows = kDirection == Direction::kFprop ? 32 : 16;

// Taps of all classes.
RESNET_FUSED_HOST_DEVICE int taps_of(const Plan& plan) {
    return plan.fill[plan.fills - 1].first_tap + plan.fill[plan.fills - 1].taps;
}

struct ConvPipeline {
    int stages;  // tiles of weights
    int fills;
    int fill_rows;
    int forming;  // warps,
    int slots;    // and the pieces that each has room for
    int lead;     // steps of a consumer before the next may begin, at most; 0: no turns
    bool resident;
    bool direct;
    std::uint32_t piece_bytes;  // with the partner's
    // Byte offsets; fills are at 0.
    std::uint32_t weights;
    std::uint32_t pieces;
    std::uint32_t states;   // of the epilogue,
    std::uint32_t zeros;    // a row of them
    std::uint32_t vectors;  // of the epilogue
    std::uint32_t notes;
    std::uint32_t flag;
    std::uint32_t barriers;
    std::uint32_t bytes;
};

// Shared addresses of one block's pipeline.
struct Places {
    const ConvPipeline& line;
    std::uint32_t shared;

    __device__ __forceinline__ std::uint32_t barrier(int index) const {
        return shared + line.barriers + static_cast<std::uint32_t>(index) * 8;
    }
    __device__ __forceinline__ std::uint32_t weights_full(int stage) const { return barrier(stage); }
    __device__ __forceinline__ std::uint32_t weights_empty(int stage) const { return barrier(line.stages + stage); }
    __device__ __forceinline__ std::uint32_t fill_full(int fill) const { return barrier(2 * line.stages + fill); }
    __device__ __forceinline__ std::uint32_t fill_empty(int fill) const {
        return barrier(2 * line.stages + line.fills + fill);
    }
    // A consumer's turn to begin a tile.
    __device__ __forceinline__ std::uint32_t turn(int consumer) const {
        return barrier(2 * (line.stages + line.fills) + consumer);
    }

    __device__ __forceinline__ std::uint32_t weights(int stage, int columns) const {
        return shared + line.weights + static_cast<std::uint32_t>(stage * columns * kRowBytes);
    }
    __device__ __forceinline__ std::uint32_t fill(int fill) const {
        return shared + static_cast<std::uint32_t>(fill * line.fill_rows * kRowBytes);
    }
    // A forming warp's slots for pieces, and its notes: on what it brings next, and on the piece in each slot.
    __device__ __forceinline__ std::uint32_t pieces(int warp) const {
        return shared + line.pieces + static_cast<std::uint32_t>(warp * line.slots) * line.piece_bytes;
    }
    __device__ __forceinline__ std::uint32_t notes(int warp) const {
        return shared + line.notes + static_cast<std::uint32_t>(warp * (line.slots + 1)) * kNoteBytes;
    }
    __device__ __forceinline__ std::uint32_t piece_full(int warp, int slot) const {
        return notes(warp) + static_cast<std::uint32_t>((slot + 1) * kNoteBytes + kNoteBarrier);
    }
};

RESNET_FUSED_HOST_DEVICE int barriers_of(const ConvPipeline& line, int consumers) {
    return 2 * (line.stages + line.fills) + consumers;
}

// A place in a ring, and the parity of its full barrier's phase.
struct Ring {
    int place = 0;
    std::uint32_t phase = 0;

    __device__ __forceinline__ void advance(int places) {
        if (++place < places) return;
        place = 0;
        phase ^= 1;
    }
};

// --- weights ---------------------------------------------------------------------------------------------------------

// fprop: a row of 64 source channels for each column. dgrad: 64 columns of each source channel, after them the next 64.
template <Direction kDirection, int kColumns>
__device__ __forceinline__ void load_weight(const ConvMaps& maps, std::uint32_t to, std::uint32_t barrier, int channel,
                                            int tap, int column) {
    barrier_arrive_expect(barrier, kColumns * kRowBytes);
    if constexpr (kDirection == Direction::kFprop) {
        tma_load_3d(to, &maps.weight, barrier, channel, tap, column);
    } else {
#pragma unroll
        for (int part = 0; part < kColumns / kWeightRows; ++part) {
            tma_load_3d(to + part * kWeightRows * kRowBytes, &maps.weight, barrier, column + part * kWeightRows, tap,
                        channel);
        }
    }
}

// Place of a tap's weights where they are resident.
__device__ __forceinline__ int resident_stage(const Plan& plan, int channel, int tap) {
    return channel / kWeightRows * taps_of(plan) + tap;
}

// One thread brings all weights that the program uses.
template <Direction kDirection, class kTile>
__device__ __forceinline__ void load_weights(const ConvParams& p, const ConvMaps& maps, const Places& places,
                                             const Program& program) {
    constexpr int kColumns = kTile::kColumns;
    const int column = program.n * kColumns;
    if (places.line.resident) {
        for (int stage = 0; stage < places.line.stages; ++stage) {
            const int taps = taps_of(p.plan);
            load_weight<kDirection, kColumns>(maps, places.weights(stage, kColumns), places.weights_full(stage),
                                              stage / taps * kWeightRows, p.plan.tap[stage % taps].weight, column);
        }
        return;
    }
    Ring ring;
    FillStep step;
    for (step.begin(p, program, program.m); step.valid(program); step.advance(p, program, kWeightRows)) {
        const Fill& fill = p.plan.fill[step.fill];
        for (int tap = fill.first_tap; tap < fill.first_tap + fill.taps; ++tap) {
            barrier_wait(places.weights_empty(ring.place), ring.phase ^ 1);
            load_weight<kDirection, kColumns>(maps, places.weights(ring.place, kColumns),
                                              places.weights_full(ring.place), step.channel, p.plan.tap[tap].weight,
                                              column);
            ring.advance(places.line.stages);
        }
    }
}

// --- source ----------------------------------------------------------------------------------------------------------

// From the pixel of grid position (i, j) in the source, (i, j) times the stride, to what a fill holds for it. At stride
// 1 this is all: pixels outside the image come out as others, which are never read.
__device__ __forceinline__ int pixel_offset(const Plan& plan, const Fill& fill) {
    return fill.dh * plan.source_w + fill.dw;
}

// One thread brings a plain operand.
template <class kTile>
__device__ __forceinline__ void load_source(const ConvParams& p, const ConvMaps& maps, const Places& places,
                                            const Program& program) {
    Ring ring;
    FillStep step;
    for (step.begin(p, program, program.m); step.valid(program); step.advance(p, program, kWeightRows)) {
        const Fill& fill = p.plan.fill[step.fill];
        const int first = step.first_row(p, kTile::kRows) + fill.lo + pixel_offset(p.plan, fill);
        const int copies = (kTile::kRows + fill.extra + kDirectRows - 1) / kDirectRows;
        barrier_wait(places.fill_empty(ring.place), ring.phase ^ 1);
        barrier_arrive_expect(places.fill_full(ring.place),
                              static_cast<std::uint32_t>(copies * kDirectRows * kRowBytes));
        for (int i = 0; i < copies; ++i) {
            tma_load_2d(places.fill(ring.place) + i * kDirectRows * kRowBytes, &maps.values,
                        places.fill_full(ring.place), step.channel, first + i * kDirectRows);
        }
        ring.advance(places.line.fills);
    }
}

}  // namespace resnet_fused::conv3x3
