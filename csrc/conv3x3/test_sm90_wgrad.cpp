// Runs the Hopper wgrad in the emulator and compares with the gradient by definition.
//
// Strides, dilations, odd sizes, images smaller than the kernel, channels that fill no block or no tile, every form of
// both operands, both feeds, one split and several; copies and products as early and as late as the hardware may make
// them.

#include <set>
#include <string>
#include <vector>

#include "conv3x3/launch.h"
#include "conv3x3/test_direct.h"
#include "conv3x3/wgrad_splits.h"
#include "emulator/emulator.h"

using namespace resnet_fused::conv3x3;
using namespace resnet_fused::conv3x3::test;
using resnet_fused::Bf16;
using resnet_fused::Fp16;
using resnet_fused::to_float;
using resnet_fused::emulator::Mode;
using resnet_fused::emulator::settings;

namespace {

Report report;

struct Case {
    const char* why;
    Shape shape;
    Type type;
    bool activated = false;  // x
    bool gradient = false;   // dy
    Sign sign = Sign::kNone;
    bool scaled = false;
    bool norm = false;
    int multiprocessors = 1;
    int splits = 1;  // that follow
    std::size_t shared_limit = 227 * 1024;
};

constexpr float kUntouched = 12345.0f;

std::set<int> stages_seen;

Config config_of(Feed feed) {
    return {Chip::kHopper, 64, 0, feed};
}

WgradParams params_of(const Case& test, Feed feed, const Operand& x, const Operand& dy) {
    WgradParams p{};
    p.plan = forward_plan(test.shape.geometry(), feed);
    p.x = x;
    p.dy = dy;
    p.c = p.group_c = test.shape.c;
    p.k = p.group_k = test.shape.k;
    p.vector_x = p.vector_dy = true;
    return p;
}

// The partial sums of all splits.
template <class T>
std::vector<float> run(const Case& test, Feed feed) {
    const Shape& s = test.shape;
    std::mt19937 random(7);
    Tensor<T> x(s.in_pixels(), s.c, random);
    Tensor<T> dy(s.out_pixels(), s.k, random);
    if (test.activated) x.activate(random);
    if (test.gradient) dy.differentiate(random, test.sign, test.scaled || test.norm, test.norm);

    WgradParams p = params_of(test, feed, x.operand(), dy.operand());
    settings().multiprocessors = test.multiprocessors;
    settings().shared_limit = test.shared_limit;
    Launch launch;
    if (!plan_sm90_wgrad(config_of(feed), test.type, p, 0, launch)) {
        report.expect(feed == Feed::kIm2col && test.shared_limit < 227 * 1024, std::string(test.why) + ": no launch");
        return {};
    }
    stages_seen.insert(launch.stages);
    report.expect(launch.splits == test.splits, std::string(test.why) + ": splits");
    p.blocks_per_split = launch.blocks_per_split;
    p.splits = launch.splits;
    const std::size_t elements = static_cast<std::size_t>(s.k) * kTaps * s.c;
    std::vector<float> partial(launch.splits * elements + 1, NAN);
    partial.back() = kUntouched;
    p.partial = partial.data();
    run_sm90_wgrad(launch, test.type, p, nullptr);
    report.expect(partial.back() == kUntouched, std::string(test.why) + ": written beyond the last split");

    Exact exact(elements);
    every_product(s, [&](int in, int out, int, int c, int k, int w) {
        exact.add(w, double{to_float(dy.formed(out, k))} * to_float(x.formed(in, c)));
    });
    for (std::size_t i = 0; i < elements; ++i) {
        double sum = 0;
        for (int split = 0; split < launch.splits; ++split) {
            sum += partial[split * elements + i];
        }
        report.near(sum, exact.value[i], 2e-6 * exact.magnitude[i] + 1e-12, test.why, i);
    }
    return partial;
}

std::vector<Case> cases() {
    std::vector<Case> cases;
    const Type bf16 = Type::kBf16;
    const Type fp16 = Type::kFp16;
    const auto add = [&](const char* why, Shape shape, Type type, auto change) {
        Case test{why, shape, type};
        change(test);
        cases.push_back(test);
    };
    const auto plain = [](Case&) {};
    const auto norms = [](Case& t) { t.activated = t.gradient = t.norm = true; };
    for (const Type type : {bf16, fp16}) {
        add("plain", {2, 9, 11, 64, 64}, type, plain);
        add("norms, several tiles", {1, 7, 10, 136, 72}, type, norms);
        add("stride 2", {2, 7, 6, 24, 16, 2}, type, norms);
    }
    add("the ring goes round", {2, 19, 17, 64, 64}, bf16, norms);
    add("the ring goes round, stride 2", {4, 20, 19, 64, 64, 2}, fp16, norms);
    add("three stages", {1, 22, 17, 64, 24}, fp16, [&](Case& t) {
        norms(t);
        t.shared_limit = 100 * 1024;
    });
    add("two stages", {1, 22, 17, 24, 64}, bf16, [&](Case& t) {
        norms(t);
        t.shared_limit = 66 * 1024;
    });
    add("splits", {3, 15, 20, 64, 64}, bf16, [&](Case& t) {
        norms(t);
        t.multiprocessors = t.splits = 3;
    });
    add("splits, the last shorter, stride 2", {7, 21, 16, 72, 8, 2}, bf16, [&](Case& t) {
        norms(t);
        t.multiprocessors = 4;
        t.splits = 2;
    });
    add("rows longer than a block", {1, 4, 70, 8, 24}, bf16, norms);
    add("masked by bits", {2, 6, 7, 24, 72}, bf16, [](Case& t) {
        t.gradient = true;
        t.sign = Sign::kBits;
    });
    add("masked by bits, scaled", {3, 9, 8, 8, 24}, fp16, [](Case& t) {
        t.activated = t.gradient = t.scaled = true;
        t.sign = Sign::kBits;
    });
    add("masked by bits, norm", {2, 9, 8, 16, 136}, bf16, [&](Case& t) {
        norms(t);
        t.sign = Sign::kBits;
    });
    add("masked by values", {1, 9, 8, 16, 24}, fp16, [](Case& t) {
        t.gradient = true;
        t.sign = Sign::kValues;
    });
    add("masked by values, norm, stride 2", {1, 19, 18, 16, 72, 2}, bf16, [&](Case& t) {
        norms(t);
        t.sign = Sign::kValues;
    });
    add("scaled", {1, 5, 4, 8, 8}, bf16, [](Case& t) { t.gradient = t.scaled = true; });
    add("stride 3", {2, 20, 19, 16, 8, 3}, fp16, norms);
    add("stride 3 of an image smaller than that", {5, 2, 2, 16, 8, 3}, bf16, norms);
    add("dilation 2", {1, 13, 11, 16, 8, 1, 2}, fp16, norms);
    add("stride 2, dilation 2", {1, 15, 13, 16, 8, 2, 2}, bf16, norms);
    add("stride 2, dilation 3", {1, 16, 15, 16, 8, 2, 3}, fp16, norms);
    add("dilation beyond the image", {3, 4, 3, 8, 8, 1, 5}, bf16, norms);
    add("one pixel", {3, 1, 1, 8, 8}, bf16, norms);
    add("one column", {2, 40, 1, 8, 8}, fp16, norms);
    add("one row", {2, 1, 40, 8, 8}, bf16, norms);
    return cases;
}

void run_everywhere(const Case& test, Feed feed) {
    const auto once = [&](Mode mode, std::uint64_t seed) {
        settings().mode = mode;
        settings().seed = seed;
        return test.type == Type::kFp16 ? run<Fp16>(test, feed) : run<Bf16>(test, feed);
    };
    try {
        const std::vector<float> eager = once(Mode::eager, 1);
        for (std::uint64_t seed = 2; seed <= (feed == Feed::kHalo ? 3 : 2); ++seed) {
            report.expect(once(Mode::lazy, seed) == eager,
                          std::string(test.why) + ": other bits when copies come late");
        }
    } catch (const std::exception& error) {
        report.expect(false, std::string(test.why) + ": " + error.what());
    }
}

// Problems that the kernel leaves to others.
void check_declined() {
    const Case test{"", {1, 6, 6, 64, 64}, Type::kBf16};
    const auto expect = [&](const char* why, bool planned, Type type, auto change) {
        settings() = {};
        WgradParams p = params_of(test, Feed::kHalo, {}, {});
        Config config = config_of(Feed::kHalo);
        change(p, config);
        Launch launch;
        report.expect(plan_sm90_wgrad(config, type, p, 0, launch) == planned, std::string("declined: ") + why);
    };
    expect("nothing", true, Type::kBf16, [](auto&, auto&) {});
    expect("another chip's configuration", false, Type::kBf16,
           [](auto&, auto& config) { config.chip = Chip::kPortable; });
    expect("rows", false, Type::kBf16, [](auto&, auto& config) { config.rows = 128; });
    expect("capability", false, Type::kBf16, [](auto&, auto&) { settings().capability = 100; });
    expect("fp32", false, Type::kFp32, [](auto&, auto&) {});
    expect("groups", false, Type::kBf16, [](auto& p, auto&) { p.group_c = p.group_k = 32; });
    expect("rows of x that are no vectors", false, Type::kBf16, [](auto& p, auto&) { p.vector_x = false; });
    expect("rows of dy that are no vectors", false, Type::kBf16, [](auto& p, auto&) { p.vector_dy = false; });
    expect("no images", false, Type::kBf16,
           [](auto& p, auto&) { p.plan = forward_plan({0, 6, 6, 1, 1}, Feed::kHalo); });
    const Geometry wide{1, 4, 2000, 1, 1};
    expect("a halo too long", false, Type::kBf16, [&](auto& p, auto&) { p.plan = forward_plan(wide, Feed::kHalo); });
    expect("im2col of the same", true, Type::kBf16,
           [&](auto& p, auto&) { p.plan = forward_plan(wide, Feed::kIm2col); });
}

// Splits cover the blocks, none is empty, none so short that it costs more than it saves.
void check_splits() {
    const auto split = [](int tiles, int blocks, int at_once) {
        WgradParams p{};
        p.tiles_k = tiles;
        p.tiles_c = 1;
        p.blocks = blocks;
        set_splits(p, 64, at_once);
        return p;
    };
    for (const int tiles : {1, 3, 16, 200}) {
        for (int blocks = 1; blocks < 300; ++blocks) {
            const WgradParams p = split(tiles, blocks, 24);
            const std::string what = "splits of " + std::to_string(blocks) + " blocks";
            report.expect(p.splits * p.blocks_per_split >= blocks, what + " lack some");
            report.expect((p.splits - 1) * p.blocks_per_split < blocks, what + ": the last is empty");
            report.expect(p.splits == 1 || p.blocks_per_split >= 4, what + " are short");
        }
    }
    report.expect(split(1, 12544, 132).splits == 131, "one tile, whole wave");
    report.expect(split(64, 196, 132).splits == 2, "64 tiles, whole wave");
}

}  // namespace

int main() {
    for (const Case& test : cases()) {
        run_everywhere(test, Feed::kHalo);
        run_everywhere(test, Feed::kIm2col);
    }
    report.expect(stages_seen == std::set<int>{2, 3, 4}, "some number of stages was not seen");
    check_declined();
    check_splits();
    return report.result("sm90 wgrad");
}
