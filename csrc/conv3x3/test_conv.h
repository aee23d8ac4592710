// Runs a kernel of fprop or dgrad in the emulator and compares with the convolution by definition (test_direct.h).
//
// Each case runs with copies as early and as late as the hardware may make them and with several orders of the threads:
// the first result is compared, the others must have the same bits.

#pragma once

#include <algorithm>
#include <cstring>

#include "conv3x3/launch.h"
#include "conv3x3/test_direct.h"
#include "emulator/emulator.h"

namespace resnet_fused::conv3x3::test {

// The kernels under test.
struct ConvKernels {
    Chip chip;
    bool (*plan)(const Config&, Type, Direction, const ConvParams&, int device, Launch&);
    void (*run)(const Launch&, Type, Direction, const ConvParams&);
};

struct ConvCase {
    std::string why;
    Shape shape;
    Type type;
    int rows = 128;
    int columns = 64;
    Feed feed = Feed::kHalo;
    int multiprocessors = 2;
    std::size_t shared_limit = 227 * 1024;
    // fprop
    bool activated = false;
    bool statistics = false;
    bool bias = false;
    bool residual = false;
    bool relu = false;
    float offset = 0;  // of the output, by the bias
    // dgrad
    Sign sign = Sign::kNone;
    bool scaled = false;
    bool norm = false;
    Sign skip_sign = Sign::kNone;
    bool skip = false;
    bool deferred = false;
    bool sums = false;
    bool keep = false;
};

// A 16-byte access needs whole chunks.
template <class T>
bool whole_chunks(int channels) {
    return channels % kChunk<T> == 0;
}

// Of a sum of terms of this magnitude: fp32 accumulation, and TF32 products where the type has them.
inline double sum_tolerance(Type type, double magnitude) {
    return magnitude * (type == Type::kTf32 ? 1e-3 : 2e-6) + 1e-12;
}

// What both directions share: the parameters with the launch's members, and the memory for partial results.
template <class T>
class ConvRun {
  protected:
    ConvRun(const ConvCase& test, Direction direction, Report& report)
        : test_(test), direction_(direction), report_(report) {}

    void fill(const Operand& source, const std::vector<T>& weight, int target_channels, Plan plan) {
        const Shape& s = test_.shape;
        const int c = s.c / s.groups;
        const int k = s.k / s.groups;
        const bool fprop = direction_ == Direction::kFprop;
        params_.plan = plan;
        params_.source = source;
        params_.weight = weight.data();
        params_.target_channels = target_channels;
        params_.group_source = fprop ? c : k;
        params_.group_target = fprop ? k : c;
        params_.weight_inner = c;
        params_.vector_source = whole_chunks<T>(source.channels);
        params_.vector_weight = whole_chunks<T>(c);
        params_.vector_target = whole_chunks<T>(target_channels);
    }

    // Runs the kernel with out and all results that it must write set to NaN; the bytes of out.
    std::vector<unsigned char> launch(const ConvKernels& kernels, std::vector<T>& out) {
        const Config config{kernels.chip, test_.rows, test_.columns, test_.feed};
        Launch launch;
        if (!kernels.plan(config, test_.type, direction_, params_, 0, launch)) {
            report_.expect(false, test_.why + ": no launch");
            return {};
        }
        params_.tiles_m = launch.tiles_m;
        params_.tiles_n = launch.tiles_n;
        params_.programs_m = launch.programs_m;
        std::vector<float> first(static_cast<std::size_t>(launch.programs_m) * params_.target_channels, NAN);
        std::vector<float> second = first;
        std::vector<int> arrived(launch.tiles_n, 0);
        params_.partials = {first.data(), second.data(), arrived.data()};
        std::fill(out.begin(), out.end(), from_float<T>(NAN));
        params_.out = out.data();
        kernels.run(launch, test_.type, direction_, params_);
        report_.expect(std::all_of(arrived.begin(), arrived.end(), [](int n) { return n == 0; }),
                       test_.why + ": counters are not left at zero");
        std::vector<unsigned char> bytes(out.size() * sizeof(T));
        std::memcpy(bytes.data(), static_cast<const void*>(out.data()), bytes.size());
        return bytes;
    }

    template <class U>
    static void append(std::vector<unsigned char>& bytes, const std::vector<U>& values) {
        const auto* const from = reinterpret_cast<const unsigned char*>(values.data());
        bytes.insert(bytes.end(), from, from + values.size() * sizeof(U));
    }

    const ConvCase& test_;
    Direction direction_;
    Report& report_;
    ConvParams params_{};
};

template <class T>
class FpropRun : ConvRun<T> {
    using Base = ConvRun<T>;
    using Base::params_;
    using Base::report_;
    using Base::test_;

  public:
    FpropRun(const ConvCase& test, Report& report)
        : Base(test, Direction::kFprop, report), x_(test.shape.in_pixels(), test.shape.c, random_) {
        const Shape& s = test.shape;
        if (test.activated) x_.activate(random_);
        weight_ = random_tensor<T>(static_cast<std::size_t>(s.k) * kTaps * (s.c / s.groups), random_);
        out_.resize(static_cast<std::size_t>(s.out_pixels()) * s.k);
        bias_ = random_tensor<float>(s.k, random_, test.offset - 1, test.offset + 1);
        residual_ = random_tensor<T>(out_.size(), random_);
        Base::fill(x_.operand(), weight_, s.k, forward_plan(s.geometry(), test.feed));
    }

    std::vector<unsigned char> run(const ConvKernels& kernels) {
        mean_.assign(test_.shape.k, NAN);
        m2_ = mean_;
        count_ = -1;
        params_.forward = {test_.bias ? bias_.data() : nullptr,
                           test_.residual ? residual_.data() : nullptr,
                           test_.relu,
                           test_.statistics,
                           &count_,
                           mean_.data(),
                           m2_.data()};
        auto bytes = Base::launch(kernels, out_);
        if (test_.statistics) {
            Base::append(bytes, mean_);
            Base::append(bytes, m2_);
        }
        return bytes;
    }

    void check() const {
        const Shape& s = test_.shape;
        Exact exact(out_.size());
        every_product(s, [&](int in, int pixel, int, int c, int k, int w) {
            exact.add(static_cast<std::size_t>(pixel) * s.k + k,
                      double{to_float(x_.formed(in, c))} * to_float(weight_[w]));
        });
        for (std::size_t i = 0; i < out_.size(); ++i) {
            double want = exact.value[i];
            if (test_.bias) want += bias_[i % s.k];
            if (test_.residual) want += to_float(residual_[i]);
            if (test_.relu) want = std::max(want, 0.0);
            const double magnitude = exact.magnitude[i] + 2 + std::fabs(test_.offset);
            report_.near(to_float(out_[i]), want, sum_tolerance(test_.type, magnitude) + kRounding<T> * std::fabs(want),
                         test_.why, i);
        }
        if (test_.statistics) check_statistics();
    }

  private:
    void check_statistics() const {
        const Shape& s = test_.shape;
        report_.expect(count_ == s.out_pixels(), test_.why + ": count");
        const auto at = [&](int pixel, int k) { return to_float(out_[static_cast<std::size_t>(pixel) * s.k + k]); };
        for (int k = 0; k < s.k; ++k) {
            long double sum = 0, squares = 0;
            for (int pixel = 0; pixel < s.out_pixels(); ++pixel) {
                sum += at(pixel, k);
            }
            const long double mean = sum / s.out_pixels();
            for (int pixel = 0; pixel < s.out_pixels(); ++pixel) {
                squares += (at(pixel, k) - mean) * (at(pixel, k) - mean);
            }
            report_.near(mean_[k], mean, 1e-6 * (1 + std::fabs(static_cast<double>(mean))), "mean of " + test_.why, k);
            report_.near(m2_[k], squares, 1e-5 * squares + 1e-7, "m2 of " + test_.why, k);
        }
    }

    std::mt19937 random_{7};
    Tensor<T> x_;
    std::vector<T> weight_, residual_, out_;
    std::vector<float> bias_, mean_, m2_;
    std::int32_t count_ = -1;
};

template <class T>
class DgradRun : ConvRun<T> {
    using Base = ConvRun<T>;
    using Base::params_;
    using Base::report_;
    using Base::test_;

  public:
    DgradRun(const ConvCase& test, Report& report)
        : Base(test, Direction::kDgrad, report),
          dy_(test.shape.out_pixels(), test.shape.k, random_),
          x_(test.shape.in_pixels(), test.shape.c, random_),
          skip_(test.shape.in_pixels(), test.shape.c, random_) {
        const Shape& s = test.shape;
        dy_.differentiate(random_, test.sign, test.scaled || test.norm, test.norm);
        if (test.sign == Sign::kNone && !test.scaled && !test.norm) dy_.form = Form::kPlain;
        weight_ = random_tensor<T>(static_cast<std::size_t>(s.k) * kTaps * (s.c / s.groups), random_);
        x_.activate(random_);
        skip_.differentiate(random_, test.skip_sign, false, false);
        mean_ = random_tensor<float>(s.c, random_);
        rstd_ = random_tensor<float>(s.c, random_, 0.5f, 2.0f);
        out_.resize(static_cast<std::size_t>(s.in_pixels()) * s.c);
        Base::fill(dy_.operand(), weight_, s.c, backward_plan(s.geometry(), test.feed));
    }

    std::vector<unsigned char> run(const ConvKernels& kernels) {
        kept_.assign(dy_.size(), from_float<T>(NAN));
        dbeta_.assign(test_.shape.c, NAN);
        dgamma_ = dbeta_;
        Backward& end = params_.backward;
        if (test_.deferred) {
            end.x = x_.values.data();
            end.scale = x_.a.data();
            end.shift = x_.c.data();
        }
        if (test_.sums) {
            end.mean = mean_.data();
            end.rstd = rstd_.data();
            end.dbeta = dbeta_.data();
            end.dgamma = dgamma_.data();
        }
        if (test_.skip) {
            end.skip = skip_.values.data();
            end.skip_mask = skip_.mask();
            end.skip_scale = kSkipScale;
        }
        end.dy = test_.keep ? kept_.data() : nullptr;
        auto bytes = Base::launch(kernels, out_);
        if (test_.sums) {
            Base::append(bytes, dbeta_);
            Base::append(bytes, dgamma_);
        }
        return bytes;
    }

    void check() const {
        const Shape& s = test_.shape;
        Exact exact(out_.size());
        every_product(s, [&](int in, int pixel, int, int c, int k, int w) {
            exact.add(static_cast<std::size_t>(in) * s.c + c,
                      double{to_float(dy_.formed(pixel, k))} * to_float(weight_[w]));
        });
        for (std::size_t i = 0; i < out_.size(); ++i) {
            const int c = static_cast<int>(i % s.c);
            double want = exact.value[i];
            if (test_.skip && Tensor<T>::passes(skip_.mask(), i)) want += kSkipScale * to_float(skip_.values[i]);
            if (test_.deferred && std::fmaf(to_float(x_.values[i]), x_.a[c], x_.c[c]) <= 0) want = 0;
            report_.near(to_float(out_[i]), want,
                         sum_tolerance(test_.type, exact.magnitude[i] + 1) + kRounding<T> * std::fabs(want), test_.why,
                         i);
        }
        for (std::size_t i = 0; test_.keep && i < kept_.size(); ++i) {
            const int pixel = static_cast<int>(i / s.k);
            const int k = static_cast<int>(i % s.k);
            report_.near(to_float(kept_[i]), to_float(dy_.formed(pixel, k)), 0, "dy of " + test_.why, i);
        }
        if (test_.sums) check_sums();
    }

  private:
    static constexpr float kSkipScale = 0.75f;

    void check_sums() const {
        const int channels = test_.shape.c;
        std::vector<double> sum(channels), weighted(channels), scale(channels);
        for (std::size_t i = 0; i < out_.size(); ++i) {
            const int c = static_cast<int>(i % channels);
            const double dz = to_float(out_[i]);
            sum[c] += dz;
            weighted[c] += dz * (double{to_float(x_.values[i])} - mean_[c]) * rstd_[c];
            scale[c] += std::fabs(dz) * 4;
        }
        for (int c = 0; c < channels; ++c) {
            report_.near(dbeta_[c], sum[c], 2e-6 * scale[c] + 1e-9, "dbeta of " + test_.why, c);
            report_.near(dgamma_[c], weighted[c], 4e-6 * scale[c] + 1e-9, "dgamma of " + test_.why, c);
        }
    }

    std::mt19937 random_{11};
    Tensor<T> dy_, x_, skip_;
    std::vector<T> weight_, out_, kept_;
    std::vector<float> mean_, rstd_, dbeta_, dgamma_;
};

// Runs a case with every mode and `seeds` seeds each.
template <template <class> class Run>
void run_case(const ConvCase& test, const ConvKernels& kernels, int seeds, Report& report) {
    const auto with = [&](auto element) {
        Run<decltype(element)> run(test, report);
        auto& settings = emulator::settings();
        settings.multiprocessors = test.multiprocessors;
        settings.shared_limit = test.shared_limit;
        std::vector<unsigned char> expected;
        for (int i = 0; i < 2 * seeds; ++i) {
            settings.mode = i % 2 == 0 ? emulator::Mode::eager : emulator::Mode::lazy;
            settings.seed = static_cast<std::uint64_t>(i + 1);
            const auto bytes = run.run(kernels);
            if (bytes.empty()) return;
            if (i == 0) {
                run.check();
                expected = bytes;
            }
            report.expect(bytes == expected, test.why + ": other bits with another order");
        }
    };
    try {
        if (test.type == Type::kFp16) {
            with(Fp16{});
        } else if (test.type == Type::kBf16) {
            with(Bf16{});
        } else {
            with(0.0f);
        }
    } catch (const std::exception& error) {
        report.expect(false, test.why + ": " + error.what());
    }
}

inline void run_cases(const std::vector<ConvCase>& fprop, const std::vector<ConvCase>& dgrad,
                      const ConvKernels& kernels, int seeds, Report& report) {
    for (const ConvCase& test : fprop) {
        run_case<FpropRun>(test, kernels, seeds, report);
    }
    for (const ConvCase& test : dgrad) {
        run_case<DgradRun>(test, kernels, seeds, report);
    }
}

}  // namespace resnet_fused::conv3x3::test
