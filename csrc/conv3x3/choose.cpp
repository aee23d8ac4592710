#include "conv3x3/choose.h"

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "common/launch.h"

namespace resnet_fused::conv3x3 {

namespace {

// Everything that some kernel may offer: plan_* decline what they do not have.
constexpr Chip kChips[] = {Chip::kHopper, Chip::kPortable};
constexpr Feed kFeeds[] = {Feed::kHalo, Feed::kIm2col};
constexpr int kRows[] = {256, 192, 128, 64, 32};
constexpr std::initializer_list<int> kColumns = {256, 192, 128, 96, 64, 32};
constexpr std::initializer_list<int> kNoColumns = {0};  // wgrad

constexpr int kChannelBlock = 64;  // source channels that a kernel takes at a time, in 16 bits

// Columns times source channels that all n-tiles together multiply, with what they add to their share.
long long product_area(const Launch& launch, const ConvParams& params) {
    long long area = 0;
    for (int first = 0; first < params.target_channels; first += launch.config.columns) {
        const int last = std::min(first + launch.config.columns, params.target_channels);
        const Channels range = source_channels(first, last, params.group_target, params.group_source, 1);
        area += launch.config.columns * ceil_div(range.end - range.begin, kChannelBlock) * kChannelBlock;
    }
    return area;
}

// The rule where nothing was measured; the least is taken. Hopper's instructions where there are any, by what its
// launches say that they take. Else: one fill for nine taps where a fill has them all (stride 1), or im2col, which
// loads no pixel that it does not multiply. The columns that waste fewest products, of these the widest: they read the
// source least often. The most rows that leave every multiprocessor something to do.
auto rank(const Launch& launch, const ConvParams& params, int device) {
    const Config& config = launch.config;
    const bool halo_first = params.plan.source_stride == 1;
    const long long tiles = static_cast<long long>(launch.tiles_m) * params.plan.classes * launch.tiles_n;
    const bool idle = tiles < multiprocessors(device);
    return std::make_tuple(config.chip != Chip::kHopper, launch.cycles, (config.feed == Feed::kHalo) != halo_first,
                           product_area(launch, params), -config.columns, idle, idle ? config.rows : -config.rows);
}

// The fills of a halo are fewer rows than those of im2col at every stride; the longest blocks have least overhead.
auto rank(const Launch& launch, const WgradParams&, int) {
    const Config& config = launch.config;
    return std::make_tuple(config.chip != Chip::kHopper, config.feed != Feed::kHalo, -config.rows);
}

// What `plan` makes of every configuration, best first.
template <class Params, class SetPlan, class PlanLaunch>
std::vector<Launch> ranked(const Params& params, std::initializer_list<int> all_columns, int device, SetPlan set_plan,
                           PlanLaunch plan_launch) {
    using Rank = decltype(rank(Launch{}, params, device));
    std::vector<std::pair<Rank, Launch>> found;
    for (const Feed feed : kFeeds) {
        set_plan(feed);
        for (const Chip chip : kChips) {
            for (const int rows : kRows) {
                for (const int columns : all_columns) {
                    Launch launch{};
                    if (!plan_launch(Config{chip, rows, columns, feed}, launch)) continue;
                    found.emplace_back(rank(launch, params, device), launch);
                }
            }
        }
    }
    std::stable_sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
    std::vector<Launch> launches;
    for (const auto& [_, launch] : found) {
        launches.push_back(launch);
    }
    return launches;
}

}  // namespace

Plan plan_of(const Geometry& geometry, Direction direction, Feed feed) {
    return direction == Direction::kDgrad ? backward_plan(geometry, feed) : forward_plan(geometry, feed);
}

std::vector<Launch> possible(const Geometry& geometry, Type type, Direction direction, ConvParams params, int device) {
    const auto set_plan = [&](Feed feed) { params.plan = plan_of(geometry, direction, feed); };
    return ranked(params, kColumns, device, set_plan, [&](const Config& config, Launch& launch) {
        return config.chip == Chip::kHopper ? plan_sm90_conv(config, type, direction, params, device, launch)
                                            : plan_portable_conv(config, type, direction, params, device, launch);
    });
}

std::vector<Launch> possible(const Geometry& geometry, Type type, WgradParams params, int device) {
    const auto set_plan = [&](Feed feed) { params.plan = plan_of(geometry, Direction::kWgrad, feed); };
    return ranked(params, kNoColumns, device, set_plan, [&](const Config& config, Launch& launch) {
        return config.chip == Chip::kHopper ? plan_sm90_wgrad(config, type, params, device, launch)
                                            : plan_portable_wgrad(config, type, params, device, launch);
    });
}

void run(const Launch& launch, Type type, Direction direction, const ConvParams& params, const ConvMaps& maps,
         cudaStream_t stream) {
    if (launch.config.chip == Chip::kHopper) {
        run_sm90_conv(launch, type, direction, params, maps, stream);
    } else {
        run_portable_conv(launch, type, direction, params, stream);
    }
}

void run(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream) {
    if (launch.config.chip == Chip::kHopper) {
        run_sm90_wgrad(launch, type, params, stream);
    } else {
        run_portable_wgrad(launch, type, params, stream);
    }
}

}  // namespace resnet_fused::conv3x3
