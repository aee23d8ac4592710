// The instantiations of one type; included by portable_conv_<type>.cu.

#pragma once

#include "conv3x3/portable_conv.cuh"

namespace resnet_fused::conv3x3 {

// A warp has 64 x 32 accumulators, 64 registers. The narrow tile leaves room for a second program on a multiprocessor,
// whose products run while the first one forms its operands or writes its results.
using WideTile = Tile<128, 128, 2, 4, 1>;
using NarrowTile = Tile<128, 64, 2, 2, 2>;

template <Type kType, class Use>
auto with_portable_conv(const Config& config, Direction direction, Use use) {
    const auto with_tile = [&](auto tile) {
        using kTile = decltype(tile);
        return direction == Direction::kFprop ? use(conv3x3_kernel<kType, Direction::kFprop, kTile>, kTile::kThreads)
                                              : use(conv3x3_kernel<kType, Direction::kDgrad, kTile>, kTile::kThreads);
    };
    if constexpr (sizeof(Element<kType>) == 2) {
        if (config.columns == WideTile::kColumns) return with_tile(WideTile{});
    }
    return with_tile(NarrowTile{});
}

template <Type kType>
void launch_portable_conv(const Launch& launch, Direction direction, const PortableParams& params,
                          cudaStream_t stream) {
    with_portable_conv<kType>(launch.config, direction, [&](auto kernel, int threads) {
        resnet_fused::launch(kernel, launch.blocks, threads, launch.shared, stream, params);
    });
}

template <Type kType>
int portable_conv_on_multiprocessor(const Config& config, Direction direction, std::size_t shared) {
    return with_portable_conv<kType>(config, direction, [&](auto kernel, int threads) {
        return blocks_per_multiprocessor(kernel, threads, shared);
    });
}

}  // namespace resnet_fused::conv3x3
