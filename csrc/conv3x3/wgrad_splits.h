// How wgrad shares the positions out to programs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/launch.h"
#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3 {

// Sets blocks_per_split and splits such that the last program ends first, where `at_once` of them run at a time and a
// block has `rows` positions. Of equals the fewest splits, so that none is empty (but the one split of no blocks).
// Reads tiles and blocks.
inline void set_splits(WgradParams& problem, int rows, int at_once) {
    constexpr std::int64_t kMaxWaves = 4;
    constexpr std::int64_t kLeast = 256;     // positions of a split
    constexpr std::int64_t kOverhead = 512;  // positions that take as long as a program's start, end and sums
    const std::int64_t tiles = static_cast<std::int64_t>(problem.tiles_k) * problem.tiles_c;
    const std::int64_t most = std::min(kMaxWaves * at_once / tiles, problem.blocks * std::int64_t{rows} / kLeast);
    std::int64_t best = 0;
    for (std::int64_t splits = 1; splits <= std::max<std::int64_t>(most, 1); ++splits) {
        const std::int64_t per_split = ceil_div(problem.blocks, splits);
        const std::int64_t time = ceil_div(tiles * splits, at_once) * (per_split * rows + kOverhead);
        if (splits > 1 && time >= best) continue;
        best = time;
        problem.blocks_per_split = static_cast<int>(per_split);
        problem.splits = static_cast<int>(splits);
    }
}

}  // namespace resnet_fused::conv3x3
