// Checks the arithmetic of merge.h on the host, against sums in long double over the values themselves.
//
// Every way to cut 0 to 9 values into tiles, merged in order and as a tree; then many tiles, counts beyond 2^24 and
// 2^32, means far from zero, empty tiles that hold NaN, inf, and the finalize formula.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "batch_norm/merge.h"

using resnet_fused::Finalized;
using resnet_fused::Moments;

namespace {

int failures = 0;
long checks = 0;

// Infinite and NaN answers must agree in kind.
void expect(const char* what, double got, long double want, long double tolerance) {
    ++checks;
    const bool agree = std::isfinite(static_cast<double>(want)) ? std::fabs(got - want) <= tolerance
                       : std::isnan(want)                       ? std::isnan(got)
                                                                : got == static_cast<double>(want);
    if (agree) return;
    ++failures;
    if (failures <= 20) std::printf("%s: expected %.9Lg within %.3Lg, got %.9g\n", what, want, tolerance, got);
}

struct Direct {
    long double mean;
    long double m2;
};

// The statistics of values[begin, end), by definition.
Direct direct(const std::vector<float>& values, std::size_t begin, std::size_t end) {
    Direct result{0, 0};
    if (begin == end) return result;
    for (std::size_t i = begin; i < end; ++i) {
        result.mean += values[i];
    }
    result.mean /= end - begin;
    for (std::size_t i = begin; i < end; ++i) {
        result.m2 += (values[i] - result.mean) * (values[i] - result.mean);
    }
    return result;
}

Moments tile(const std::vector<float>& values, std::size_t begin, std::size_t end) {
    const Direct exact = direct(values, begin, end);
    return {static_cast<std::int64_t>(end - begin), static_cast<float>(exact.mean), static_cast<float>(exact.m2)};
}

Moments in_order(const std::vector<Moments>& tiles) {
    Moments total{0, 0, 0};
    for (const Moments& next : tiles) {
        total = merge(total, next);
    }
    return total;
}

// As the kernel does it: `rows` strided chains, then a binary tree.
Moments as_tree(const std::vector<Moments>& tiles, std::size_t rows) {
    std::vector<Moments> chain(rows, Moments{0, 0, 0});
    for (std::size_t i = 0; i < tiles.size(); ++i) {
        chain[i % rows] = merge(chain[i % rows], tiles[i]);
    }
    for (std::size_t half = rows / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) {
            chain[i] = merge(chain[i], chain[i + half]);
        }
    }
    return chain[0];
}

// Tolerances in units of fp32 rounding, of the values' size for the mean and of the sum of squares' for m2: rounding
// each tile's mean costs one, and each level of merging about one more.
void expect_moments(const char* what, const Moments& got, std::int64_t count, const Direct& want, long double size,
                    long double roundings) {
    const long double unit = std::numeric_limits<float>::epsilon();
    ++checks;
    if (got.count != count) {
        ++failures;
        std::printf("%s: expected count %lld, got %lld\n", what, static_cast<long long>(count),
                    static_cast<long long>(got.count));
    }
    expect(what, got.mean, want.mean, roundings * unit * size);
    // An error e of a tile's mean moves m2 by up to 2*e*sqrt(m2*n) + n*e^2.
    const long double slip = roundings * unit * size;
    const long double n = static_cast<long double>(count);
    expect(what, got.m2, want.m2, roundings * unit * want.m2 + 2 * slip * sqrtl(want.m2 * n) + n * slip * slip);
}

void every_cut() {
    std::mt19937 random(1);
    for (const float offset : {0.0f, 1.0f, 100.0f, -3e4f}) {
        for (std::size_t n = 0; n <= 9; ++n) {
            std::normal_distribution<float> normal(offset, 1.0f);
            std::vector<float> values(n);
            for (float& value : values) {
                value = normal(random);
            }
            const unsigned cuts = n > 1 ? 1u << (n - 1) : 1u;
            for (unsigned cut = 0; cut < cuts; ++cut) {
                std::vector<Moments> tiles;
                std::size_t begin = 0;
                for (std::size_t i = 1; i <= n; ++i) {
                    if (i < n && !(cut >> (i - 1) & 1u)) continue;
                    tiles.push_back(tile(values, begin, i));
                    const float nan = std::numeric_limits<float>::quiet_NaN();
                    tiles.push_back({0, nan, nan});  // an empty tile must not be read
                    begin = i;
                }
                const Direct want = direct(values, 0, n);
                const std::int64_t count = static_cast<std::int64_t>(n);
                const long double size = std::fabs(offset) + 4;
                expect_moments("every cut, in order", in_order(tiles), count, want, size, 8);
                expect_moments("every cut, as a tree", as_tree(tiles, 16), count, want, size, 8);
            }
        }
    }
}

void many_tiles() {
    std::mt19937 random(2);
    for (const float offset : {0.0f, 10.0f, -1000.0f}) {
        std::normal_distribution<float> normal(offset, 2.0f);
        std::uniform_int_distribution<std::size_t> length(0, 5);
        std::vector<float> values;
        std::vector<Moments> tiles;
        for (int i = 0; i < 50000; ++i) {
            const std::size_t begin = values.size();
            for (std::size_t left = length(random); left > 0; --left) {
                values.push_back(normal(random));
            }
            tiles.push_back(tile(values, begin, values.size()));
        }
        const Direct want = direct(values, 0, values.size());
        const auto count = static_cast<std::int64_t>(values.size());
        // As the kernel does it: slices of 256 tiles, then the slices. 16 + 4 levels, then 13 + 4.
        std::vector<Moments> slices;
        for (std::size_t begin = 0; begin < tiles.size(); begin += 256) {
            const auto first = tiles.begin() + static_cast<std::ptrdiff_t>(begin);
            const auto last = tiles.begin() + static_cast<std::ptrdiff_t>(std::min(begin + 256, tiles.size()));
            slices.push_back(as_tree({first, last}, 16));
        }
        expect_moments("50000 tiles", as_tree(slices, 16), count, want, std::fabs(offset) + 8, 8);
    }
}

// Equal tiles: the mean stays to the bit and the counts add exactly, far beyond what fp32 or int32 can count.
void large_counts() {
    for (const std::int64_t count : {std::int64_t{1} << 20, (std::int64_t{1} << 31) - 1}) {
        const std::vector<Moments> tiles(4099, Moments{count, 3.3f, 0.5f * static_cast<float>(count)});
        const Moments total = as_tree(tiles, 16);
        const Direct want{3.3f, 0.5L * static_cast<float>(count) * 4099};
        expect_moments("large counts", total, count * 4099, want, 0, 64);
        expect("large counts, variance", total.m2 / static_cast<float>(total.count), 0.5L, 1e-6L);
    }
    const Moments odd = merge(Moments{16777217, 0, 0}, Moments{1, 0, 0});
    expect("counts beyond 2^24", static_cast<double>(odd.count), 16777218, 0);
    const Moments lone = merge(Moments{1000000, 1.0f, 0}, Moments{1, 1000001.0f, 0});
    expect("one value against a million, mean", lone.mean, 1.0L + 1e6L / 1000001, 1e-6L);
    expect("one value against a million, m2", lone.m2, 1e12L * 1000000 / 1000001, 1e12L * 4e-7L);
}

void not_finite() {
    const float inf = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const Moments plain{4, 1.0f, 2.0f};
    const Moments infinite{4, inf, nan};  // what a tile with one inf has
    for (const Moments& total : {merge(plain, infinite), merge(infinite, plain), merge(infinite, infinite)}) {
        expect("inf, mean", total.mean, inf, 0);
        expect("inf, m2", total.m2, nan, 0);
    }
    expect("inf and -inf, mean", merge(infinite, Moments{4, -inf, nan}).mean, nan, 0);
    expect("NaN, mean", merge(plain, Moments{4, nan, nan}).mean, nan, 0);
    expect("NaN, m2", merge(Moments{4, nan, nan}, plain).m2, nan, 0);
    expect("largest values, mean", merge(Moments{1, 3e38f, 0}, Moments{1, -3e38f, 0}).mean, 0, 0);
    expect("largest values, weighted mean", merge(Moments{1, 3e38f, 0}, Moments{3, -3e38f, 0}).mean, -1.5e38L, 1e32L);
}

void finalizing() {
    const float eps = 1e-5f;
    const Finalized result = finalize(Moments{8, 3.0f, 4.0f}, -2.0f, 0.25f, eps);
    const long double rstd = 1 / sqrtl(0.5L + eps);
    expect("rstd", result.rstd, rstd, 2e-7L);
    expect("scale", result.scale, -2 * rstd, 4e-7L);
    expect("shift", result.shift, 0.25L + 6 * rstd, 2e-6L);
    expect("mean", result.mean, 3, 0);
    expect("var_unbiased", result.var_unbiased, 4.0L / 7, 1e-7L);

    const long double nan = std::numeric_limits<long double>::quiet_NaN();
    const Finalized none = finalize(Moments{0, 0, 0}, 1, 0, eps);
    expect("no values, mean", none.mean, 0, 0);
    expect("no values, rstd", none.rstd, nan, 0);
    const Finalized one = finalize(Moments{1, 5.0f, 0}, 1, 0, eps);
    expect("one value, rstd", one.rstd, 1 / sqrtl(eps), 1e-4L);
    expect("one value, var_unbiased", one.var_unbiased, nan, 0);
    const Finalized zero_gamma = finalize(Moments{8, 3.0f, 4.0f}, 0, 0.25f, eps);
    expect("gamma 0, scale", zero_gamma.scale, 0, 0);
    expect("gamma 0, shift", zero_gamma.shift, 0.25L, 0);
    const Finalized broken = finalize(Moments{8, 3.0f, static_cast<float>(nan)}, 1, 0, eps);
    expect("NaN, shift", broken.shift, nan, 0);
}

}  // namespace

int main() {
    every_cut();
    many_tiles();
    large_counts();
    not_finite();
    finalizing();
    std::printf("merge: %ld checks, %d failures\n", checks, failures);
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
