// Which launches of the portable fprop and dgrad there are; portable_conv.cuh has the kernel.

#include <algorithm>

#include "conv3x3/portable_conv.cuh"

namespace resnet_fused::conv3x3 {

namespace {

constexpr int kTileRows = 128;
constexpr int kWarpRows = 2;
constexpr int kMaxStages = 4;  // of the weights' ring
constexpr int kMinStages = 2;

template <class Use>
auto with_type(Type type, Use use) {
    switch (type) {
        case Type::kFp16:
            return use(std::integral_constant<Type, Type::kFp16>{});
        case Type::kBf16:
            return use(std::integral_constant<Type, Type::kBf16>{});
        case Type::kFp32:
            return use(std::integral_constant<Type, Type::kFp32>{});
        default:
            return use(std::integral_constant<Type, Type::kTf32>{});
    }
}

// One fill ahead where fills serve several taps, as many as weights where each serves one.
int buffers_of(const Config& config, int stages) {
    return config.feed == Feed::kHalo ? 2 : stages;
}

Layout layout_for(const Config& config, const ConvParams& params, int stages) {
    return layout_of(config.rows, config.columns, kWarpRows, params.plan.extra, params.source.partner != nullptr,
                     buffers_of(config, stages), stages);
}

// Stages for which `programs` find room on a multiprocessor side by side, or 0. A program takes a KiB more than it asks
// for.
int stages_for(const Config& config, const ConvParams& params, int programs, int device) {
    constexpr std::size_t kReserved = 1024;
    const std::size_t limit = (shared_limit(device) + kReserved) / programs - kReserved;
    int stages = kMaxStages;
    while (stages >= kMinStages && layout_for(config, params, stages).bytes > limit)
        --stages;
    return stages >= kMinStages ? stages : 0;
}

}  // namespace

bool plan_portable_conv(const Config& config, Type type, Direction direction, const ConvParams& params, int device,
                        Launch& launch) {
    const bool wide = config.columns == 128 && (type == Type::kFp16 || type == Type::kBf16);
    if (config.chip != Chip::kPortable || config.rows != kTileRows || !(wide || config.columns == 64)) return false;
    int stages = config.columns == 128 ? 0 : stages_for(config, params, 2, device);
    if (stages == 0) stages = stages_for(config, params, 1, device);
    if (stages == 0) return false;
    launch = {};
    launch.config = config;
    launch.stages = stages;
    launch.shared = layout_for(config, params, stages).bytes;
    launch.tiles_m = static_cast<int>(ceil_div(positions(params.plan), config.rows));
    launch.tiles_n = static_cast<int>(ceil_div(params.target_channels, config.columns));
    const int on_multiprocessor = with_type(type, [&](auto constant) {
        return portable_conv_on_multiprocessor<decltype(constant)::value>(config, direction, launch.shared);
    });
    const int at_once = multiprocessors(device) * std::max(on_multiprocessor, 1);
    launch.programs_m = std::clamp(at_once / launch.tiles_n, 1, params.plan.classes * launch.tiles_m);
    launch.blocks = static_cast<unsigned>(launch.programs_m) * static_cast<unsigned>(launch.tiles_n);
    launch.threads = config.columns == 128 ? 256 : 128;
    return true;
}

void run_portable_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params,
                       cudaStream_t stream) {
    const PortableParams given{params, layout_for(launch.config, params, launch.stages),
                               buffers_of(launch.config, launch.stages), launch.stages};
    with_type(type, [&](auto constant) {
        launch_portable_conv<decltype(constant)::value>(launch, direction, given, stream);
        return 0;
    });
}

}  // namespace resnet_fused::conv3x3
