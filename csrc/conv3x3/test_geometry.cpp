// Checks geometry.h on the host: plans are carried out as kernels carry them out, tile by tile, fill by fill, and
// compared with the convolution by definition.
//
// Every image of 1 to 7 rows and columns, stride and dilation 1 to 3, both directions, both feeds, several tile sizes.
// Values are integers, so that the comparison is exact; what a fill holds outside the source is poison. Then division
// by multiplication at its edges, the swizzle, and the channels of groups.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "conv3x3/geometry.h"

using namespace resnet_fused::conv3x3;

namespace {

using Values = std::vector<std::int64_t>;
constexpr std::int64_t kPoison = std::int64_t{1} << 40;

int failures = 0;
long checks = 0;

void expect(bool holds, const char* what, const Geometry& at, Feed feed) {
    ++checks;
    if (holds) return;
    ++failures;
    if (failures <= 20) {
        std::printf("%s: n %d, %d x %d, stride %d, dilation %d, %s\n", what, at.images, at.height, at.width, at.stride,
                    at.dilation, feed == Feed::kHalo ? "halo" : "im2col");
    }
}

void expect(bool holds, const char* what) {
    expect(holds, what, {}, Feed::kHalo);
}

Values random_values(int size, std::mt19937& random) {
    std::uniform_int_distribution<int> uniform(-99, 99);
    Values values(static_cast<std::size_t>(size));
    for (auto& value : values) {
        value = uniform(random);
    }
    return values;
}

int output_size(int size, int stride) {
    return (size - 1) / stride + 1;
}

// --- the definition -------------------------------------------------------------------------------------------------

// Calls visit(input pixel, output pixel, tap) for every product of the convolution.
template <class Visit>
void every_product(const Geometry& at, Visit visit) {
    const int p = output_size(at.height, at.stride);
    const int q = output_size(at.width, at.stride);
    for (int n = 0; n < at.images; ++n) {
        for (int i = 0; i < p; ++i) {
            for (int j = 0; j < q; ++j) {
                for (int t = 0; t < kTaps; ++t) {
                    const int h = i * at.stride + (t / 3 - 1) * at.dilation;
                    const int w = j * at.stride + (t % 3 - 1) * at.dilation;
                    if (h < 0 || h >= at.height || w < 0 || w >= at.width) continue;
                    visit((n * at.height + h) * at.width + w, (n * p + i) * q + j, t);
                }
            }
        }
    }
}

int input_pixels(const Geometry& at) {
    return at.images * at.height * at.width;
}

int output_pixels(const Geometry& at) {
    return at.images * output_size(at.height, at.stride) * output_size(at.width, at.stride);
}

// --- a plan, carried out ---------------------------------------------------------------------------------------------

// The rows of one fill for the tile that begins at grid position m0.
Values filled(const Plan& plan, const Fill& fill, const Values& source, int m0, int rows) {
    Values held(static_cast<std::size_t>(rows + fill.extra), kPoison);
    for (int row = 0; row < rows + fill.extra; ++row) {
        const int pixel = source_pixel(plan, fill, m0 + fill.lo + row);
        if (pixel >= 0) held[static_cast<std::size_t>(row)] = source[static_cast<std::size_t>(pixel)];
    }
    return held;
}

// Calls visit(grid position, class, tap of the weight, value) for every product that a kernel makes of a plan.
template <class Visit>
void every_planned_product(const Plan& plan, const Values& source, int rows, Visit visit) {
    const int tiles = (positions(plan) + rows - 1) / rows;
    for (int tile = 0; tile < plan.classes * tiles; ++tile) {
        const Class& cls = plan.cls[tile / tiles];
        const int m0 = tile % tiles * rows;
        for (int f = cls.first_fill; f < cls.first_fill + cls.fills; ++f) {
            const Fill& fill = plan.fill[f];
            const Values held = filled(plan, fill, source, m0, rows);
            for (int m = m0; m < m0 + rows; ++m) {
                const std::uint32_t mask = tap_mask(plan, fill, m);
                for (int t = 0; t < fill.taps; ++t) {
                    const Tap& tap = plan.tap[fill.first_tap + t];
                    if (!(mask >> t & 1)) continue;
                    visit(m, cls, tap.weight, held.at(static_cast<std::size_t>(m - m0 + tap.shift - fill.lo)));
                }
            }
        }
    }
}

// The target that a plan gives; poison where it is not written or written twice.
Values planned(const Plan& plan, const Values& source, const Values& weight, int rows, int target_pixels) {
    const auto size = static_cast<std::size_t>(target_pixels);
    Values target(size, 0);
    std::vector<int> written(size, 0);
    for (int c = 0; c < plan.classes; ++c) {
        for (int m = 0; m < positions(plan) + rows; ++m) {
            const int pixel = target_pixel(plan, plan.cls[c], m);
            if (pixel >= 0) ++written.at(static_cast<std::size_t>(pixel));
        }
    }
    every_planned_product(plan, source, rows, [&](int m, const Class& cls, int tap, std::int64_t value) {
        const int pixel = target_pixel(plan, cls, m);
        if (pixel >= 0) target.at(static_cast<std::size_t>(pixel)) += value * weight[static_cast<std::size_t>(tap)];
    });
    for (std::size_t i = 0; i < size; ++i) {
        if (written[i] != 1) target[i] = kPoison;
    }
    return target;
}

void consistent(const Plan& plan, const Geometry& at, Feed feed) {
    int taps = 0;
    int fills = 0;
    std::vector<int> seen(kTaps, 0);
    for (int c = 0; c < plan.classes; ++c) {
        const Class& cls = plan.cls[c];
        expect(cls.first_fill == fills, "fills of a class follow those of the last", at, feed);
        fills += cls.fills;
        for (int f = cls.first_fill; f < fills; ++f) {
            const Fill& fill = plan.fill[f];
            expect(fill.first_tap == taps && fill.taps > 0, "taps of a fill follow those of the last", at, feed);
            expect(fill.extra <= plan.extra, "extra is the greatest", at, feed);
            for (int t = taps; t < taps + fill.taps; ++t) {
                const int row = plan.tap[t].shift - fill.lo;
                expect(row >= 0 && row <= fill.extra, "a tap stays in its fill", at, feed);
                ++seen[static_cast<std::size_t>(plan.tap[t].weight)];
            }
            taps += fill.taps;
            for (int e = -2; contiguous(plan, fill) && e < positions(plan) + 2; ++e) {
                const int pixel = e >= 0 && e < positions(plan) ? e : -1;
                expect(source_pixel(plan, fill, e) == pixel, "rows of a contiguous fill are pixels", at, feed);
            }
        }
    }
    expect(fills == plan.fills, "fills are counted", at, feed);
    expect(std::count(seen.begin(), seen.end(), 1) == kTaps, "every tap of the weight has its place", at, feed);
    const int most = at.stride == 1 ? 1 : at.stride == 2 ? 4 : 9;
    expect(feed == Feed::kIm2col ? plan.fills == kTaps && plan.extra == 0 : plan.fills <= most, "fills are few", at,
           feed);
}

void both_directions(const Geometry& at, Feed feed, std::mt19937& random) {
    const Values x = random_values(input_pixels(at), random);
    const Values dy = random_values(output_pixels(at), random);
    const Values weight = random_values(kTaps, random);
    Values y(dy.size(), 0);
    Values dx(x.size(), 0);
    Values dw(kTaps, 0);
    every_product(at, [&](int input, int output, int tap) {
        const auto i = static_cast<std::size_t>(input);
        const auto o = static_cast<std::size_t>(output);
        const auto t = static_cast<std::size_t>(tap);
        y[o] += x[i] * weight[t];
        dx[i] += dy[o] * weight[t];
        dw[t] += dy[o] * x[i];
    });
    const Plan forward = forward_plan(at, feed);
    const Plan backward = backward_plan(at, feed);
    consistent(forward, at, feed);
    consistent(backward, at, feed);
    for (const int rows : {1, 5, 16, 256}) {
        expect(planned(forward, x, weight, rows, output_pixels(at)) == y, "fprop", at, feed);
        expect(planned(backward, dy, weight, rows, input_pixels(at)) == dx, "dgrad", at, feed);
        Values found(kTaps, 0);
        every_planned_product(forward, x, rows, [&](int m, const Class&, int tap, std::int64_t value) {
            found[static_cast<std::size_t>(tap)] += dy.at(static_cast<std::size_t>(m)) * value;
        });
        expect(found == dw, "wgrad", at, feed);
    }
}

void every_small_convolution() {
    std::mt19937 random(1);
    for (int height = 1; height <= 7; ++height) {
        for (int width = 1; width <= 7; ++width) {
            for (int stride = 1; stride <= kMaxStride; ++stride) {
                for (int dilation = 1; dilation <= 3; ++dilation) {
                    const Geometry at{1 + (height + width) % 3, height, width, stride, dilation};
                    both_directions(at, Feed::kHalo, random);
                    both_directions(at, Feed::kIm2col, random);
                }
            }
        }
    }
}

// --- the rest -------------------------------------------------------------------------------------------------------

void divides(std::uint32_t by) {
    constexpr std::uint32_t kLargest = 2147483647;
    const Divisor divisor = resnet_fused::conv3x3::divisor(by);
    const auto agrees = [&](std::uint32_t dividend) {
        if (dividend <= kLargest) expect(divide(dividend, divisor) == dividend / by, "division");
    };
    const std::uint32_t multiples = kLargest / by;
    const std::uint32_t ends = std::min(multiples, 40u);
    for (std::uint32_t i = 0; i <= ends; ++i) {
        for (const std::uint32_t multiple : {i * by, (multiples - i) * by, multiples / 2 * by}) {
            if (multiple > 0) agrees(multiple - 1);
            agrees(multiple);
            agrees(multiple + 1);
        }
    }
    agrees(kLargest);
}

void every_divisor() {
    for (std::uint32_t by = 1; by <= 70000; ++by) {
        divides(by);
    }
    for (int log = 16; log < 31; ++log) {
        for (int off = -3; off <= 3; ++off) {
            divides((1u << log) + static_cast<std::uint32_t>(off));
        }
    }
    divides(2147483646);
    divides(2147483647);
}

// The bulk copy engine XORs bits 4 to 6 of an address with bits 7 to 9.
void every_swizzle() {
    for (int row = 0; row < 1024; ++row) {
        for (int chunk = 0; chunk < 8; ++chunk) {
            const auto address = static_cast<std::uint32_t>(row * 128 + chunk * 16);
            expect(swizzled(row, chunk) == (address ^ (address >> 7 & 7) << 4), "swizzle");
        }
    }
}

void every_group() {
    for (int group_target = 1; group_target <= 6; ++group_target) {
        for (int group_source = 1; group_source <= 6; ++group_source) {
            for (int first = 0; first < 12; ++first) {
                for (int last = first + 1; last <= 12; ++last) {
                    int begin = 1 << 20;
                    int end = 0;
                    for (int target = first; target < last; ++target) {
                        begin = std::min(begin, target / group_target * group_source);
                        end = std::max(end, target / group_target * group_source + group_source);
                    }
                    const Channels found = source_channels(first, last, group_target, group_source, 8);
                    expect(found.begin == begin / 8 * 8 && found.end == end, "channels of groups");
                }
            }
        }
    }
}

}  // namespace

int main() {
    every_small_convolution();
    every_divisor();
    every_swizzle();
    every_group();
    std::printf("geometry: %ld checks, %d failures\n", checks, failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
