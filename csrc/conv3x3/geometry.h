// Where a 3x3 convolution reads and writes: grid positions, taps, and the plan that both feeds of the kernels follow.
//
// The rows of a kernel's matrix product are grid positions m = (n * GH + i) * GW + j, the pixels of the convolution's
// output. Padding equals the dilation d, so GH = ceil(H / s), GW = ceil(W / s) for stride s, and output pixel (i, j)
// reads with tap (r, q) the input pixel (i*s + r*d - d, j*s + q*d - d).
//
//     fprop, wgrad  the source is the convolution's input: source pixel (i*s + dh, j*s + dw), with dh = r*d - d
//     dgrad         the source is dy, whose pixels are the grid itself. Input pixel (h, w) takes tap (r, q) from dy
//     pixel
//                   ((h + d - r*d) / s, ...) where s divides. Pixels with one parity (h mod s, w mod s) = (oh, ow)
//                   share their taps: they are a class, and with h = i*s + oh the tap reads dy pixel (i + (oh + d -
//                   r*d) / s)
//
// A fill is a block of shared memory with a row for each grid position e = m0 + lo + row (flattened: rows run on over
// the image's border), which holds source pixel (i_e * source_stride + dh, j_e * source_stride + dw). A tap of a fill
// reads row m - m0 + shift - lo for grid position m. Whether it is inside the image is a matter of m alone: tap_mask().
// What a fill holds for pixels outside is never read.
//
//     halo    taps that read source pixels of one parity share a fill: one fill at stride 1, up to four at stride 2
//     im2col  a fill for each tap

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace resnet_fused::conv3x3 {

constexpr int kTaps = 9;
constexpr int kMaxStride = 3;
constexpr int kMaxClasses = kMaxStride * kMaxStride;

enum class Feed : int { kHalo = 0, kIm2col = 1 };

// Division by a number that the host knows, for dividends from 0 to 2^31 - 1: a multiplication and a shift
// (T. Granlund and P. L. Montgomery, Division by invariant integers using multiplication, PLDI 1994).
struct Divisor {
    std::uint32_t by;
    std::uint32_t factor;
    std::uint32_t shift;
};

inline Divisor divisor(std::uint32_t by) {
    std::uint32_t log = 0;
    while ((std::uint64_t{1} << log) < by)
        ++log;
    const std::uint64_t power = std::uint64_t{1} << (31 + log);
    return {by, static_cast<std::uint32_t>((power + by - 1) / by), log};
}

RESNET_FUSED_HOST_DEVICE std::uint32_t divide(std::uint32_t dividend, const Divisor& divisor) {
    const std::uint64_t product = static_cast<std::uint64_t>(dividend) * divisor.factor;
    return static_cast<std::uint32_t>(product >> 31) >> divisor.shift;
}

struct Position {
    int image;
    int row;
    int column;
};

struct Tap {
    int shift;   // in grid positions, within the fill's parity
    int dh, dw;  // source pixel of grid position (0, 0)
    int weight;  // r * 3 + q of the weight that it multiplies
};

struct Fill {
    int dh, dw;  // source pixel of grid position (0, 0)
    int lo;      // first row's grid position, relative to the tile's first
    int extra;   // rows beyond the tile's
    int first_tap;
    int taps;
};

struct Class {
    int oh, ow;  // target pixel of grid position (0, 0)
    int first_fill;
    int fills;
};

// Everything about pixels. Passed to kernels by value.
struct Plan {
    int images;
    int grid_h, grid_w;
    int source_h, source_w, source_stride;
    int target_h, target_w, target_stride;
    int classes;
    int fills;
    int extra;  // greatest of all fills
    Divisor by_width;
    Divisor by_image;
    Tap tap[kTaps];
    Fill fill[kTaps];
    Class cls[kMaxClasses];
};

struct Geometry {
    int images;
    int height, width;  // of the convolution's input
    int stride, dilation;
};

RESNET_FUSED_HOST_DEVICE int positions(const Plan& plan) {
    return plan.images * plan.grid_h * plan.grid_w;
}

RESNET_FUSED_HOST_DEVICE Position position_of(const Plan& plan, int m) {
    const int image = static_cast<int>(divide(static_cast<std::uint32_t>(m), plan.by_image));
    const int rest = m - image * static_cast<int>(plan.by_image.by);
    const int row = static_cast<int>(divide(static_cast<std::uint32_t>(rest), plan.by_width));
    return {image, row, rest - row * static_cast<int>(plan.by_width.by)};
}

// Whether fill rows are consecutive pixels of the source.
RESNET_FUSED_HOST_DEVICE bool contiguous(const Plan& plan, const Fill& fill) {
    return plan.source_stride == 1 && fill.dh == 0 && fill.dw == 0;
}

// Whether the fill of a tile holds the tile's own grid positions, as consecutive pixels.
RESNET_FUSED_HOST_DEVICE bool holds_tile(const Plan& plan, const Fill& fill) {
    return contiguous(plan, fill) && fill.lo <= 0 && fill.lo + fill.extra >= 0;
}

// Index of the source pixel of grid position e in a fill, or -1 if it is outside.
RESNET_FUSED_HOST_DEVICE int source_pixel(const Plan& plan, const Fill& fill, int e) {
    if (e < 0 || e >= positions(plan)) return -1;
    const Position at = position_of(plan, e);
    const int h = at.row * plan.source_stride + fill.dh;
    const int w = at.column * plan.source_stride + fill.dw;
    const bool inside = h >= 0 && h < plan.source_h && w >= 0 && w < plan.source_w;
    return inside ? (at.image * plan.source_h + h) * plan.source_w + w : -1;
}

// Bit t - fill.first_tap says whether tap t of grid position m reads a pixel inside the image; 0 for m beyond the grid.
RESNET_FUSED_HOST_DEVICE std::uint32_t tap_mask(const Plan& plan, const Fill& fill, int m) {
    if (m >= positions(plan)) return 0;
    const Position at = position_of(plan, m);
    const int h = at.row * plan.source_stride;
    const int w = at.column * plan.source_stride;
    std::uint32_t mask = 0;
    for (int t = 0; t < fill.taps; ++t) {
        const Tap& tap = plan.tap[fill.first_tap + t];
        const bool inside =
            h + tap.dh >= 0 && h + tap.dh < plan.source_h && w + tap.dw >= 0 && w + tap.dw < plan.source_w;
        mask |= static_cast<std::uint32_t>(inside) << t;
    }
    return mask;
}

// Index of the target pixel of grid position m in a class, or -1 if there is none.
RESNET_FUSED_HOST_DEVICE int target_pixel(const Plan& plan, const Class& cls, int m) {
    if (m >= positions(plan)) return -1;
    if (plan.target_stride == 1) return m;
    const Position at = position_of(plan, m);
    const int h = at.row * plan.target_stride + cls.oh;
    const int w = at.column * plan.target_stride + cls.ow;
    if (h >= plan.target_h || w >= plan.target_w) return -1;
    return (at.image * plan.target_h + h) * plan.target_w + w;
}

// Byte offset of 16-byte chunk `chunk` (0 to 7) of a 128-byte row, as the bulk copy engine's 128-byte swizzle places
// it.
RESNET_FUSED_HOST_DEVICE std::uint32_t swizzled(int row, int chunk) {
    return static_cast<std::uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
}

// Source channels [begin, end) that target channels [first, last) of a grouped convolution take part of; `begin` is
// brought down to a multiple of `align`, the weights of what is added by that are zero.
struct Channels {
    int begin, end;
};

RESNET_FUSED_HOST_DEVICE Channels source_channels(int first, int last, int group_target, int group_source, int align) {
    const int begin = first / group_target * group_source;
    return {begin - begin % align, ((last - 1) / group_target + 1) * group_source};
}

// The plan of fprop and wgrad, and that of dgrad, whose classes come with most taps first.
Plan forward_plan(const Geometry& geometry, Feed feed);
Plan backward_plan(const Geometry& geometry, Feed feed);

}  // namespace resnet_fused::conv3x3
