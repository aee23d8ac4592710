// The 3x3 convolution by definition, in double, for tests of the kernels in the emulator.
//
// What a kernel rounds on the way, its formed operands and its results, is rounded here too; sums are exact but for
// double's rounding. Every value comes with the sum of its terms' magnitudes: the scale of the error that fp32 sums
// make.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "common/numeric.h"
#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3::test {

struct Shape {
    int images, height, width, c, k;
    int stride = 1, dilation = 1, groups = 1;

    int out_height() const { return (height + stride - 1) / stride; }
    int out_width() const { return (width + stride - 1) / stride; }
    int in_pixels() const { return images * height * width; }
    int out_pixels() const { return images * out_height() * out_width(); }
    Geometry geometry() const { return {images, height, width, stride, dilation}; }
};

// Calls visit(input pixel, output pixel, tap, channel, filter, weight index) for every product of the convolution.
template <class Visit>
void every_product(const Shape& at, Visit visit) {
    const int inner = at.c / at.groups;
    const int per_group = at.k / at.groups;
    for (int n = 0; n < at.images; ++n) {
        for (int i = 0; i < at.out_height(); ++i) {
            for (int j = 0; j < at.out_width(); ++j) {
                for (int tap = 0; tap < kTaps; ++tap) {
                    const int h = i * at.stride + (tap / 3 - 1) * at.dilation;
                    const int w = j * at.stride + (tap % 3 - 1) * at.dilation;
                    if (h < 0 || h >= at.height || w < 0 || w >= at.width) continue;
                    const int in = (n * at.height + h) * at.width + w;
                    const int out = (n * at.out_height() + i) * at.out_width() + j;
                    for (int k = 0; k < at.k; ++k) {
                        const int first = k / per_group * inner;
                        for (int c = 0; c < inner; ++c) {
                            visit(in, out, tap, first + c, k, (k * kTaps + tap) * inner + c);
                        }
                    }
                }
            }
        }
    }
}

template <class T>
std::vector<T> random_tensor(std::size_t size, std::mt19937& random, float low = -1.0f, float high = 1.0f) {
    std::uniform_real_distribution<float> uniform(low, high);
    std::vector<T> values(size);
    for (T& value : values) {
        value = from_float<T>(uniform(random));
    }
    return values;
}

inline std::vector<std::uint8_t> random_bits(std::size_t elements, std::mt19937& random) {
    std::vector<std::uint8_t> bytes((elements + 7) / 8);
    for (auto& byte : bytes) {
        byte = static_cast<std::uint8_t>(random());
    }
    return bytes;
}

// An operand with the memory that it points to. T is the type of its elements.
template <class T>
struct Tensor {
    int pixels, channels;
    std::vector<T> values, partner, mask_values;
    std::vector<std::uint8_t> mask_bits;
    std::vector<float> a, b, c;
    Form form = Form::kPlain;

    Tensor(int pixel_count, int channel_count, std::mt19937& random)
        : pixels(pixel_count), channels(channel_count), values(random_tensor<T>(size(), random)) {}

    std::size_t size() const { return static_cast<std::size_t>(pixels) * channels; }

    void activate(std::mt19937& random) {
        form = Form::kActivated;
        a = random_tensor<float>(channels, random, 0.5f, 1.5f);
        c = random_tensor<float>(channels, random, -0.2f, 0.6f);  // relu(shift) != 0 at the border
    }

    void differentiate(std::mt19937& random, Sign sign, bool scaled, bool norm) {
        form = Form::kGradient;
        if (sign == Sign::kBits) mask_bits = random_bits(size(), random);
        if (sign == Sign::kValues) mask_values = random_tensor<T>(size(), random);
        if (scaled) a = random_tensor<float>(channels, random, 0.5f, 1.5f);
        if (!norm) return;
        partner = random_tensor<T>(size(), random);
        b = random_tensor<float>(channels, random);
        c = random_tensor<float>(channels, random);
    }

    Mask mask() const {
        if (!mask_bits.empty()) return {mask_bits.data(), Sign::kBits};
        if (!mask_values.empty()) return {mask_values.data(), Sign::kValues};
        return {nullptr, Sign::kNone};
    }

    Operand operand() const {
        const auto pointer = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
        return {values.data(), pointer(partner), mask(), pointer(a), pointer(b), pointer(c), channels, form};
    }

    static bool passes(const Mask& mask, std::size_t at) {
        if (mask.sign == Sign::kBits) return static_cast<const std::uint8_t*>(mask.data)[at / 8] >> (at % 8) & 1;
        if (mask.sign == Sign::kValues) return !(to_float(static_cast<const T*>(mask.data)[at]) <= 0);
        return true;
    }

    // What the convolution reads, rounded to T.
    T formed(int pixel, int channel) const {
        const std::size_t at = static_cast<std::size_t>(pixel) * channels + channel;
        const float v = to_float(values[at]);
        if (form == Form::kPlain) return values[at];
        if (form == Form::kActivated) {
            const float z = std::fmaf(v, a[channel], c[channel]);
            return from_float<T>(z <= 0 ? 0 : z);
        }
        const float dz = passes(mask(), at) ? v : 0.0f;
        if (!partner.empty()) {
            return from_float<T>(std::fmaf(a[channel], dz, std::fmaf(to_float(partner[at]), b[channel], c[channel])));
        }
        return from_float<T>(a.empty() ? dz : dz * a[channel]);
    }
};

// Values with the magnitude of what was summed.
struct Exact {
    std::vector<double> value, magnitude;

    explicit Exact(std::size_t size) : value(size), magnitude(size) {}

    void add(std::size_t at, double term) {
        value[at] += term;
        magnitude[at] += std::fabs(term);
    }
};

// Half the distance of neighbouring values of T, relative.
template <class T>
constexpr double kRounding = sizeof(T) == 4            ? 6e-8
                             : std::is_same_v<T, Bf16> ? 4e-3
                                                       : 5e-4;

// Counts comparisons and reports failures.
struct Report {
    long checks = 0;
    long failures = 0;

    void expect(bool holds, const std::string& what) {
        ++checks;
        if (holds) return;
        if (++failures <= 20) std::printf("%s\n", what.c_str());
    }

    void near(double got, double want, double tolerance, const std::string& what, std::size_t at) {
        ++checks;
        if (std::fabs(got - want) <= tolerance) return;  // false for NaN
        if (++failures <= 20) {
            std::printf("%s: element %zu: expected %.9g within %.3g, got %.9g\n", what.c_str(), at, want, tolerance,
                        got);
        }
    }

    int result(const char* name) const {
        std::printf("%s: %ld checks, %ld failures\n", name, checks, failures);
        return failures == 0 && checks > 0 ? 0 : 1;
    }
};

}  // namespace resnet_fused::conv3x3::test
