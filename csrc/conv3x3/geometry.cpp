#include "conv3x3/geometry.h"

#include <algorithm>
#include <vector>

namespace resnet_fused::conv3x3 {

namespace {

int ceil_div(int amount, int share) {
    return (amount + share - 1) / share;
}

int floor_div(int amount, int share) {
    return amount >= 0 ? amount / share : -ceil_div(-amount, share);
}

// A tap before it has a place: source offset dh = fill_dh + source_stride * di, and so for columns.
struct Reach {
    int fill_dh, fill_dw;
    int di, dj;
    int weight;
};

Plan empty_plan(const Geometry& geometry) {
    Plan plan{};
    plan.images = geometry.images;
    plan.grid_h = ceil_div(geometry.height, geometry.stride);
    plan.grid_w = ceil_div(geometry.width, geometry.stride);
    plan.by_width = divisor(static_cast<std::uint32_t>(std::max(plan.grid_w, 1)));
    plan.by_image = divisor(static_cast<std::uint32_t>(std::max(plan.grid_h * plan.grid_w, 1)));
    return plan;
}

// Adds a class with its taps, those of one parity in one fill.
void add_class(Plan& plan, int oh, int ow, std::vector<Reach> reaches, int& taps) {
    std::stable_sort(reaches.begin(), reaches.end(), [](const Reach& x, const Reach& y) {
        return x.fill_dh != y.fill_dh ? x.fill_dh < y.fill_dh : x.fill_dw < y.fill_dw;
    });
    Class& cls = plan.cls[plan.classes++];
    cls = {oh, ow, plan.fills, 0};
    for (std::size_t i = 0; i < reaches.size(); ++i) {
        const Reach& reach = reaches[i];
        const bool opens = i == 0 || reach.fill_dh != reaches[i - 1].fill_dh || reach.fill_dw != reaches[i - 1].fill_dw;
        if (opens) {
            plan.fill[plan.fills++] = {reach.fill_dh, reach.fill_dw, 0, 0, taps, 0};
            ++cls.fills;
        }
        Fill& fill = plan.fill[plan.fills - 1];
        Tap& tap = plan.tap[taps++];
        tap.shift = reach.di * plan.grid_w + reach.dj;
        tap.dh = reach.fill_dh + plan.source_stride * reach.di;
        tap.dw = reach.fill_dw + plan.source_stride * reach.dj;
        tap.weight = reach.weight;
        const int high = std::max(opens ? tap.shift : fill.lo + fill.extra, tap.shift);
        fill.lo = opens ? tap.shift : std::min(fill.lo, tap.shift);
        fill.extra = high - fill.lo;
        ++fill.taps;
        plan.extra = std::max(plan.extra, fill.extra);
    }
}

}  // namespace

Plan forward_plan(const Geometry& geometry, Feed feed) {
    Plan plan = empty_plan(geometry);
    const int s = geometry.stride;
    plan.source_h = geometry.height;
    plan.source_w = geometry.width;
    plan.source_stride = s;
    plan.target_h = plan.grid_h;
    plan.target_w = plan.grid_w;
    plan.target_stride = 1;
    std::vector<Reach> reaches;
    for (int r = 0; r < 3; ++r) {
        for (int q = 0; q < 3; ++q) {
            const int dh = (r - 1) * geometry.dilation;
            const int dw = (q - 1) * geometry.dilation;
            const int di = feed == Feed::kHalo ? floor_div(dh, s) : 0;
            const int dj = feed == Feed::kHalo ? floor_div(dw, s) : 0;
            reaches.push_back({dh - di * s, dw - dj * s, di, dj, r * 3 + q});
        }
    }
    int taps = 0;
    add_class(plan, 0, 0, reaches, taps);
    return plan;
}

Plan backward_plan(const Geometry& geometry, Feed feed) {
    Plan plan = empty_plan(geometry);
    const int s = geometry.stride;
    plan.source_h = plan.grid_h;
    plan.source_w = plan.grid_w;
    plan.source_stride = 1;
    plan.target_h = geometry.height;
    plan.target_w = geometry.width;
    plan.target_stride = s;

    struct Parity {
        int oh, ow;
        std::vector<Reach> reaches;
    };
    std::vector<Parity> parities;
    for (int oh = 0; oh < s; ++oh) {
        for (int ow = 0; ow < s; ++ow) {
            Parity parity{oh, ow, {}};
            for (int r = 0; r < 3; ++r) {
                for (int q = 0; q < 3; ++q) {
                    const int up = oh + (1 - r) * geometry.dilation;
                    const int left = ow + (1 - q) * geometry.dilation;
                    if (up % s != 0 || left % s != 0) continue;
                    const bool halo = feed == Feed::kHalo;
                    const Reach reach =
                        halo ? Reach{0, 0, up / s, left / s, r * 3 + q} : Reach{up / s, left / s, 0, 0, r * 3 + q};
                    parity.reaches.push_back(reach);
                }
            }
            parities.push_back(std::move(parity));
        }
    }
    std::stable_sort(parities.begin(), parities.end(),
                     [](const Parity& x, const Parity& y) { return x.reaches.size() > y.reaches.size(); });
    int taps = 0;
    for (const Parity& parity : parities) {
        add_class(plan, parity.oh, parity.ow, parity.reaches, taps);
    }
    return plan;
}

}  // namespace resnet_fused::conv3x3
