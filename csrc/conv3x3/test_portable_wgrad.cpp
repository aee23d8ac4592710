// Runs the portable wgrad and the sum of its splits in the emulator and compares with the convolution by definition.
//
// Strides, dilations, odd sizes, images smaller than the kernel, channels that fill no chunk, no block or no tile,
// groups, every form of x and of dy, both feeds, all types, one split and several, rings that come round, two stages to
// four; copies as early and as late as the hardware may make them, threads in several orders.

#include <algorithm>
#include <cstring>

#include "conv3x3/launch.h"
#include "conv3x3/test_direct.h"
#include "emulator/emulator.h"

using namespace resnet_fused::conv3x3;
using namespace resnet_fused::conv3x3::test;
using resnet_fused::Bf16;
using resnet_fused::Fp16;
using resnet_fused::from_float;
using resnet_fused::kChunk;
using resnet_fused::to_float;
namespace emulator = resnet_fused::emulator;

namespace {

Report report;

constexpr float kUntouched = 12345.0f;
constexpr std::size_t kGuard = 64;  // elements behind the results

struct Case {
    std::string why;
    Shape shape;
    Type type;
    Feed feed = Feed::kHalo;
    int rows = 64;
    bool activated = false;
    Sign sign = Sign::kNone;
    bool scaled = false;
    bool norm = false;
    int multiprocessors = 16;  // the more, the more splits
    int splits = 0;            // if not 0: what the launch must have
    int stages = 0;
    std::size_t shared_limit = 227 * 1024;
    int misaligned = 0;  // elements by which partial results begin behind an aligned address
};

// Of a sum of terms of this magnitude: fp32 accumulation, and TF32 products where the type has them.
double tolerance(Type type, double magnitude) {
    return magnitude * (type == Type::kTf32 ? 1e-3 : 2e-6) + 1e-12;
}

template <class T>
struct Problem {
    Tensor<T> x, dy;
    WgradParams params{};

    Problem(const Case& test, std::mt19937& random)
        : x(test.shape.in_pixels(), test.shape.c, random), dy(test.shape.out_pixels(), test.shape.k, random) {
        const Shape& s = test.shape;
        if (test.activated) x.activate(random);
        if (test.sign != Sign::kNone || test.scaled || test.norm) {
            dy.differentiate(random, test.sign, test.scaled || test.norm, test.norm);
        }
        params.plan = forward_plan(s.geometry(), test.feed);
        params.x = x.operand();
        params.dy = dy.operand();
        params.c = s.c;
        params.k = s.k;
        params.group_c = s.c / s.groups;
        params.group_k = s.k / s.groups;
        params.vector_x = s.c % kChunk<T> == 0;
        params.vector_dy = s.k % kChunk<T> == 0;
    }
};

template <class T>
constexpr Out kOut = std::is_same_v<T, Fp16>   ? Out::kFp16
                     : std::is_same_v<T, Bf16> ? Out::kBf16
                                               : Out::kFp32;

// The sum of the splits, added in order, and rounded to T.
template <class T>
std::vector<T> check_reduce(const std::string& why, const float* partial, int splits, std::size_t elements) {
    std::vector<T> out(elements + kGuard, from_float<T>(kUntouched));
    run_wgrad_reduce(partial, splits, static_cast<long long>(elements), out.data(), kOut<T>, nullptr);
    for (std::size_t i = 0; i < out.size(); ++i) {
        float sum = 0;
        for (int split = 0; split < splits && i < elements; ++split) {
            sum += partial[split * elements + i];
        }
        const float want = to_float(from_float<T>(i < elements ? sum : kUntouched));
        report.near(to_float(out[i]), want, 0, why + ": reduce", i);
    }
    out.resize(elements);
    return out;
}

// The sum of the splits against the definition.
template <class T>
void check(const Case& test, const Problem<T>& problem, const float* partial, int splits) {
    const std::size_t elements = static_cast<std::size_t>(test.shape.k) * kTaps * problem.params.group_c;
    const std::vector<float> got = check_reduce<float>(test.why, partial, splits, elements);
    if (sizeof(T) == 2) check_reduce<T>(test.why, partial, splits, elements);
    Exact exact(elements);
    every_product(test.shape, [&](int in, int pixel, int, int c, int k, int w) {
        exact.add(w, double{to_float(problem.x.formed(in, c))} * to_float(problem.dy.formed(pixel, k)));
    });
    for (std::size_t i = 0; i < elements; ++i) {
        report.near(got[i], exact.value[i], tolerance(test.type, exact.magnitude[i]), test.why, i);
    }
}

// Partial results of all splits: the same bits in every order of events, so those of the first are checked.
template <class T>
std::vector<float> run_wgrad(const Case& test) {
    std::mt19937 random(7);
    const Shape& s = test.shape;
    Problem<T> problem(test, random);
    WgradParams& p = problem.params;
    emulator::settings().multiprocessors = test.multiprocessors;
    emulator::settings().shared_limit = test.shared_limit;
    Launch launch;
    const bool fits = plan_portable_wgrad({Chip::kPortable, test.rows, 0, test.feed}, test.type, p, 0, launch);
    report.expect(fits, test.why + ": no launch");
    if (!fits) return {};
    report.expect(test.splits == 0 || launch.splits == test.splits,
                  test.why + ": splits " + std::to_string(launch.splits));
    report.expect(test.stages == 0 || launch.stages == test.stages,
                  test.why + ": stages " + std::to_string(launch.stages));

    const std::size_t elements = static_cast<std::size_t>(s.k) * kTaps * p.group_c;
    const std::size_t all = elements * launch.splits;
    std::vector<float> memory(all + test.misaligned + kGuard + 4, NAN);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    float* const partial = memory.data() + (16 - address % 16) % 16 / sizeof(float) + test.misaligned;
    std::fill_n(partial + all, kGuard, kUntouched);
    p.partial = partial;
    p.blocks_per_split = launch.blocks_per_split;
    p.splits = launch.splits;
    run_portable_wgrad(launch, test.type, p, nullptr);
    report.expect(std::all_of(partial + all, partial + all + kGuard, [](float v) { return v == kUntouched; }),
                  test.why + ": writes behind the result");

    if (emulator::settings().mode == emulator::Mode::eager) check(test, problem, partial, launch.splits);
    return {partial, partial + all};
}

const char* name_of(Type type) {
    const char* const names[] = {" fp16", " bf16", " fp32", " tf32"};
    return names[static_cast<int>(type)];
}

std::vector<Case> cases() {
    std::vector<Case> cases;
    const auto add = [&](const char* why, Shape shape, Type type, auto change) {
        Case test{std::string(why) + name_of(type), shape, type};
        change(test);
        cases.push_back(test);
    };
    const auto all = [](Case& t) {
        t.activated = t.norm = true;
        t.sign = Sign::kBits;
    };
    const auto smaller_blocks = [&](Case& t) {
        all(t);
        t.rows = 32;
    };
    const auto im2col = [&](Case& t) {
        all(t);
        t.rows = 32;
        t.feed = Feed::kIm2col;
    };
    for (const Type type : {Type::kFp16, Type::kBf16, Type::kFp32, Type::kTf32}) {
        add("plain", {2, 5, 7, 16, 24}, type, [](Case&) {});
        add("several tiles of c and of k", {1, 9, 9, 72, 136}, type, all);
        add("stride 2", {2, 15, 13, 24, 16, 2}, type, all);
        add("odd channels, mask of bits", {2, 6, 7, 5, 3}, type, all);
        add("odd channels, mask of values", {2, 6, 7, 13, 11}, type, [&](Case& t) {
            all(t);
            t.sign = Sign::kValues;
        });
        add("im2col", {2, 8, 7, 40, 16}, type, im2col);
        add("groups of 4", {2, 5, 6, 72, 72, 1, 1, 18}, type, all);
        add("several splits, the last shorter", {3, 22, 22, 8, 8}, type, [&](Case& t) {
            smaller_blocks(t);
            t.multiprocessors = 4;
            t.splits = 4;
        });
    }
    const Type fp16 = Type::kFp16;
    const Type bf16 = Type::kBf16;
    const Type fp32 = Type::kFp32;
    add("several tiles and splits", {2, 18, 17, 72, 72}, bf16, [&](Case& t) {
        all(t);
        t.multiprocessors = 8;
        t.splits = 2;
    });
    add("one split, a ring that comes round", {2, 23, 21, 8, 8}, bf16, [&](Case& t) {
        smaller_blocks(t);
        t.multiprocessors = 1;
        t.splits = 1;
        t.stages = 4;
    });
    add("two stages, a ring that comes round", {2, 23, 21, 8, 8}, bf16, [&](Case& t) {
        smaller_blocks(t);
        t.multiprocessors = 1;
        t.shared_limit = 36 * 1024;
        t.stages = 2;
    });
    add("three stages, stride 2", {2, 33, 31, 8, 8, 2}, fp16, [&](Case& t) {
        all(t);
        t.multiprocessors = 1;
        t.shared_limit = 184 * 1024;
        t.stages = 3;
    });
    add("two stages", {1, 20, 21, 8, 8}, fp32, [&](Case& t) {
        all(t);
        t.multiprocessors = 1;
        t.shared_limit = 68 * 1024;
        t.stages = 2;
    });
    add("im2col, stride 2", {2, 9, 14, 24, 16, 2}, fp16, im2col);
    add("im2col, 64 positions", {1, 12, 14, 8, 8, 1, 2}, fp16, [&](Case& t) {
        im2col(t);
        t.rows = 64;
    });
    add("stride 3", {2, 17, 16, 16, 8, 3}, fp16, all);
    add("stride 3, 32 positions", {2, 17, 16, 16, 8, 3}, fp32, smaller_blocks);
    add("stride 3 of an image smaller than that", {5, 2, 2, 16, 8, 3}, fp16, all);
    add("dilation 2", {2, 7, 9, 16, 8, 1, 2}, fp16, all);
    add("dilation 3 beyond the image", {3, 2, 3, 16, 8, 1, 3}, bf16, all);
    add("stride 2, dilation 2", {2, 11, 9, 16, 8, 2, 2}, fp16, all);
    add("stride 3, dilation 2", {2, 11, 9, 16, 8, 3, 2}, fp32, all);
    add("stride 2, dilation 3, im2col", {1, 12, 9, 16, 8, 2, 3}, fp16, im2col);
    add("one pixel", {3, 1, 1, 8, 8}, bf16, all);
    add("one row", {3, 1, 9, 8, 8}, bf16, all);
    add("one column, stride 2", {2, 9, 1, 8, 8, 2}, bf16, all);
    add("depthwise", {2, 5, 5, 70, 70, 1, 1, 70}, fp16, all);
    add("depthwise", {1, 6, 5, 40, 40, 2, 1, 40}, fp32, all);
    add("two groups that share a tile", {1, 6, 7, 96, 96, 1, 1, 2}, bf16, all);
    add("groups of unlike widths", {1, 4, 6, 12, 20, 1, 1, 2}, fp16, all);
    add("groups of unlike odd widths", {1, 4, 6, 15, 35, 1, 1, 5}, fp32, all);
    add("two groups, several tiles", {1, 5, 6, 144, 160, 1, 1, 2}, fp16, all);
    add("results that cannot be stored 16 bytes at a time", {1, 5, 6, 8, 8}, fp32, [](Case& t) { t.misaligned = 1; });
    add("results that cannot be stored 8 bytes at a time", {1, 5, 6, 8, 8}, fp16, [](Case& t) { t.misaligned = 1; });
    add("a tile for one channel", {1, 4, 5, 65, 8}, fp16, all);
    add("a tile for one channel and one filter", {1, 4, 5, 33, 33}, fp32, all);
    add("channels that fill chunks, filters that do not", {2, 5, 6, 16, 3}, bf16, all);
    add("filters that fill chunks, channels that do not", {2, 5, 6, 3, 16}, fp32, all);
    add("dy of a frozen norm", {2, 5, 7, 16, 24}, bf16, [](Case& t) { t.scaled = true; });
    add("dy of a norm without a mask", {2, 5, 7, 16, 24}, bf16, [](Case& t) { t.norm = true; });
    add("dy masked by bits", {2, 5, 7, 16, 24}, fp32, [](Case& t) { t.sign = Sign::kBits; });
    add("dy masked by values", {2, 5, 7, 16, 24}, bf16, [](Case& t) { t.sign = Sign::kValues; });
    add("dy masked by values, of a frozen norm", {2, 9, 7, 16, 24}, fp32, [](Case& t) {
        t.sign = Sign::kValues;
        t.scaled = true;
    });
    add("deferred x alone", {2, 9, 7, 16, 24}, fp16, [](Case& t) { t.activated = true; });
    add("no image", {0, 5, 7, 8, 8}, bf16, [](Case& t) { t.splits = 1; });
    return cases;
}

template <class Visit>
auto with_element(Type type, Visit visit) {
    if (type == Type::kFp16) return visit(Fp16{});
    if (type == Type::kBf16) return visit(Bf16{});
    return visit(0.0f);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void run_everywhere(const Case& test) {
    const auto run = [&](emulator::Mode mode, std::uint64_t seed) {
        emulator::settings().mode = mode;
        emulator::settings().seed = seed;
        return with_element(test.type, [&](auto element) { return run_wgrad<decltype(element)>(test); });
    };
    try {
        const std::vector<float> eager = run(emulator::Mode::eager, 1);
        for (const std::uint64_t seed : {2, 3}) {
            report.expect(same_bits(run(emulator::Mode::lazy, seed), eager),
                          test.why + ": other bits when copies come late");
        }
    } catch (const std::exception& error) {
        report.expect(false, test.why + ": " + error.what());
    }
}

// Whether there is a launch, on a device with so much shared memory.
bool offered(const Case& test) {
    emulator::settings().shared_limit = test.shared_limit;
    emulator::settings().multiprocessors = test.multiprocessors;
    std::mt19937 random(1);
    Problem<Fp16> problem(test, random);
    Launch launch;
    const bool fits =
        plan_portable_wgrad({Chip::kPortable, test.rows, 0, test.feed}, test.type, problem.params, 0, launch);
    if (!fits) return false;
    const std::string what = test.why + ", rows " + std::to_string(test.rows);
    report.expect(launch.shared <= test.shared_limit, what + ": too much shared memory");
    const int blocks = (test.shape.out_pixels() + test.rows - 1) / test.rows;
    report.expect(
        (launch.splits - 1) * launch.blocks_per_split < blocks && launch.splits * launch.blocks_per_split >= blocks,
        what + ": splits do not share the blocks");
    return true;
}

void launches() {
    for (const Type type : {Type::kFp16, Type::kBf16, Type::kFp32, Type::kTf32}) {
        Case test{"a wide image", {1, 3, 500, 8, 8}, type};
        test.norm = true;
        test.shared_limit = 99 * 1024;
        report.expect(!offered(test), "halo of a wide image");
        test.feed = Feed::kIm2col;
        test.rows = 32;
        report.expect(offered(test), "im2col of a wide image");
        test.rows = 128;
        report.expect(!offered(test), "128 positions");
        test.rows = 32;
        test.shared_limit = 48 * 1024;
        report.expect(!offered(test), "im2col with little shared memory");
    }
    for (const int images : {1, 2, 3, 7, 50}) {
        for (const int multiprocessors : {1, 3, 8, 108, 148}) {
            for (const int rows : {32, 64}) {
                Case test{"splits of " + std::to_string(images), {images, 14, 13, 200, 80}, Type::kFp16};
                test.multiprocessors = multiprocessors;
                test.rows = rows;
                report.expect(offered(test), test.why + ": no launch");
            }
        }
    }
    std::mt19937 random(1);
    Problem<Fp16> problem({"", {1, 5, 5, 8, 8}, Type::kFp16}, random);
    Launch launch;
    problem.params.x.form = Form::kGradient;
    report.expect(!plan_portable_wgrad({Chip::kPortable, 64, 0, Feed::kHalo}, Type::kFp16, problem.params, 0, launch),
                  "x as a gradient");
}

}  // namespace

int main() {
    for (const Case& test : cases()) {
        run_everywhere(test);
    }
    launches();
    return report.result("portable wgrad");
}
