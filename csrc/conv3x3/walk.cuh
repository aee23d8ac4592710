// The order in which a program of fprop or dgrad works: its tiles, of each the blocks of source channels, of each the
// fills of the tile's class, of each the taps.

#pragma once

#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3 {

// Tiles of all classes, those of the first class first; a program has every programs_m-th, all of one n-tile.
struct Program {
    int m;  // of programs_m
    int n;  // of tiles_n
    int tiles;
    Channels channels;  // of the source, that its target channels take part of
};

__device__ __forceinline__ Program program_of(const ConvParams& p, int block, int columns, int align) {
    const int n = block % p.tiles_n;
    const int last = min((n + 1) * columns, p.target_channels);
    const Channels channels = source_channels(n * columns, last, p.group_target, p.group_source, align);
    return {block / p.tiles_n, n, p.plan.classes * p.tiles_m, channels};
}

// A fill in that order. A class without fills (no tap reaches its pixels) is passed over.
struct FillStep {
    int tile;
    int cls;
    int channel;  // first of the block
    int fill;     // index into the plan

    __device__ __forceinline__ void begin(const ConvParams& p, const Program& program, int first_tile) {
        tile = first_tile;
        while (tile < program.tiles && p.plan.cls[tile / p.tiles_m].fills == 0) {
            tile += p.programs_m;
        }
        if (!valid(program)) return;
        cls = tile / p.tiles_m;
        channel = program.channels.begin;
        fill = p.plan.cls[cls].first_fill;
    }

    __device__ __forceinline__ bool valid(const Program& program) const { return tile < program.tiles; }

    __device__ __forceinline__ int first_row(const ConvParams& p, int tile_rows) const {
        return (tile - cls * p.tiles_m) * tile_rows;
    }

    __device__ __forceinline__ void advance(const ConvParams& p, const Program& program, int block) {
        const Class& of = p.plan.cls[cls];
        if (++fill < of.first_fill + of.fills) return;
        fill = of.first_fill;
        channel += block;
        if (channel < program.channels.end) return;
        begin(p, program, tile + p.programs_m);
    }
};

// A tap in that order.
struct TapStep {
    FillStep at;
    int tap;  // of the fill

    __device__ __forceinline__ void advance(const ConvParams& p, const Program& program, int block) {
        if (++tap < p.plan.fill[at.fill].taps) return;
        tap = 0;
        at.advance(p, program, block);
    }
};

}  // namespace resnet_fused::conv3x3
