// Runs the Hopper fprop and dgrad in the emulator and compares with the convolution by definition.
//
// Strides, dilations, odd sizes, images smaller than the kernel, channels that fill no chunk's block or no tile, every
// form of the source, every part of both endings, both feeds, all tiles; weights that stay and weights that pass; few
// multiprocessors, so that a program walks over several tiles; copies as early and as late as the hardware may make
// them. An argument: how many orders of the threads.

#include <cstdlib>

#include "conv3x3/test_conv.h"

using namespace resnet_fused::conv3x3;
using namespace resnet_fused::conv3x3::test;

namespace {

constexpr ConvKernels kKernels{Chip::kHopper, plan_sm90_conv,
                               [](const Launch& launch, Type type, Direction direction, const ConvParams& params) {
                                   ConvMaps maps;
                                   encode_sm90_conv(launch, type, direction, params, maps);
                                   run_sm90_conv(launch, type, direction, params, maps, nullptr);
                               }};

struct TileSize {
    int rows, columns;
};
constexpr TileSize kTiles[] = {{256, 128}, {192, 128}, {128, 128}, {256, 64}, {128, 64}};

template <class Change>
ConvCase make(std::string why, Shape shape, TileSize tile, Change change) {
    ConvCase test{std::move(why), shape, Type::kBf16};
    test.rows = tile.rows;
    test.columns = tile.columns;
    change(test);
    return test;
}

std::string text(const char* why, TileSize tile) {
    return std::string(why) + ", " + std::to_string(tile.rows) + " x " + std::to_string(tile.columns);
}

std::vector<ConvCase> fprop_cases() {
    const auto all = [](ConvCase& t) { t.activated = t.statistics = true; };
    std::vector<ConvCase> cases;
    for (const TileSize tile : kTiles) {
        cases.push_back(make(text("fprop deferred, several tiles each way", tile), {5, 11, 13, 72, 136}, tile, all));
        cases.push_back(
            make(text("fprop plain", tile), {5, 11, 13, 72, 72}, tile, [](ConvCase& t) { t.type = Type::kFp16; }));
        cases.push_back(make(text("fprop stride 2", tile), {5, 19, 18, 72, 64, 2}, tile, all));
    }
    constexpr TileSize kSmall{128, 64};
    const auto add = [&](const char* why, Shape shape, auto change) {
        cases.push_back(make(why, shape, kSmall, change));
    };
    add("fprop infer", {3, 10, 12, 24, 40}, [](ConvCase& t) { t.bias = t.residual = t.relu = true; });
    add("fprop infer, stride 2", {2, 21, 15, 24, 40, 2}, [](ConvCase& t) { t.bias = t.residual = t.relu = true; });
    add("fprop resident weights of two blocks", {4, 9, 10, 128, 64}, all);
    add("fprop passing weights", {4, 9, 10, 200, 64}, all);
    add("fprop passing weights, plain", {4, 9, 10, 136, 64}, [](ConvCase& t) { t.statistics = true; });
    add("fprop stride 3", {3, 17, 16, 8, 8, 3}, all);
    add("fprop stride 3 of an image smaller than that", {5, 2, 2, 16, 8, 3}, all);
    add("fprop dilation 2", {3, 11, 9, 16, 8, 1, 2}, all);
    add("fprop stride 2 dilation 2", {3, 13, 15, 16, 8, 2, 2}, all);
    add("fprop stride 2 dilation 3 im2col", {3, 12, 15, 16, 8, 2, 3}, [&](ConvCase& t) {
        all(t);
        t.feed = Feed::kIm2col;
    });
    add("fprop im2col deferred", {3, 9, 10, 72, 16}, [&](ConvCase& t) {
        all(t);
        t.feed = Feed::kIm2col;
    });
    add("fprop im2col plain", {3, 9, 10, 72, 16}, [&](ConvCase& t) { t.feed = Feed::kIm2col; });
    add("fprop one pixel", {3, 1, 1, 8, 8}, all);
    add("fprop one column", {2, 9, 1, 8, 8}, all);
    add("fprop mean far from 0", {6, 12, 12, 8, 8}, [](ConvCase& t) {
        t.statistics = t.bias = true;
        t.type = Type::kFp16;
        t.offset = 300;
    });
    return cases;
}

std::vector<ConvCase> dgrad_cases() {
    const auto all = [](ConvCase& t) { t.norm = t.deferred = t.sums = t.keep = true; };
    std::vector<ConvCase> cases;
    for (const TileSize tile : kTiles) {
        cases.push_back(make(text("dgrad of a norm, several tiles each way", tile), {5, 11, 13, 136, 72}, tile, all));
        cases.push_back(
            make(text("dgrad plain", tile), {5, 11, 13, 72, 72}, tile, [](ConvCase& t) { t.type = Type::kFp16; }));
        cases.push_back(make(text("dgrad stride 2, bits", tile), {5, 19, 18, 64, 72, 2}, tile, [&](ConvCase& t) {
            all(t);
            t.skip = true;
            t.sign = t.skip_sign = Sign::kBits;
        }));
    }
    constexpr TileSize kSmall{128, 64};
    const auto add = [&](const char* why, Shape shape, auto change) {
        cases.push_back(make(why, shape, kSmall, change));
    };
    add("dgrad, masks of values", {3, 9, 10, 8, 24}, [&](ConvCase& t) {
        all(t);
        t.skip = true;
        t.sign = t.skip_sign = Sign::kValues;
    });
    add("dgrad values mask only", {3, 9, 10, 16, 16}, [](ConvCase& t) {
        t.sign = Sign::kValues;
        t.keep = true;
    });
    add("dgrad bits mask and scale", {3, 9, 10, 16, 136}, [](ConvCase& t) {
        t.sign = Sign::kBits;
        t.scaled = t.keep = true;
    });
    add("dgrad frozen, im2col", {3, 9, 10, 16, 72}, [&](ConvCase& t) {
        t.scaled = t.deferred = t.sums = t.keep = true;
        t.feed = Feed::kIm2col;
    });
    add("dgrad im2col stride 2", {3, 15, 15, 136, 72, 2}, [&](ConvCase& t) {
        all(t);
        t.feed = Feed::kIm2col;
    });
    add("dgrad im2col plain", {3, 9, 10, 72, 24}, [&](ConvCase& t) { t.feed = Feed::kIm2col; });
    add("dgrad stride 3", {3, 17, 16, 16, 8, 3}, all);
    add("dgrad stride 3 dilation 3: classes without taps, skip", {3, 17, 16, 16, 8, 3, 3}, [&](ConvCase& t) {
        all(t);
        t.skip = true;
    });
    add("dgrad classes without taps, one program a tile", {1, 6, 6, 16, 8, 2, 2}, [&](ConvCase& t) {
        all(t);
        t.multiprocessors = 5;
    });
    add("dgrad dilation 2", {3, 11, 9, 16, 8, 1, 2}, all);
    add("dgrad stride 2 dilation 3", {3, 12, 15, 16, 8, 2, 3}, all);
    add("dgrad one pixel", {3, 1, 1, 8, 8}, all);
    add("dgrad one pixel stride 2", {3, 1, 1, 8, 8, 2}, all);
    return cases;
}

// What the plan declines, and which tile it says is the fastest on a GPU of 132 multiprocessors.
struct Problem {
    ConvParams params{};

    Problem(const Shape& s, Form form) {
        static const float mark = 0;
        params.plan = forward_plan(s.geometry(), Feed::kHalo);
        params.source.values = &mark;
        params.source.channels = s.c;
        params.source.form = form;
        params.target_channels = s.k;
        params.group_source = params.weight_inner = s.c / s.groups;
        params.group_target = s.k / s.groups;
        params.vector_source = params.vector_weight = s.c % 8 == 0;
        params.vector_target = s.k % 8 == 0;
    }

    bool plan(TileSize tile, Type type, Launch& launch) const {
        const Config config{Chip::kHopper, tile.rows, tile.columns, Feed::kHalo};
        return plan_sm90_conv(config, type, Direction::kFprop, params, 0, launch);
    }
};

void check_plans(Report& report) {
    auto& settings = resnet_fused::emulator::settings();
    const auto runs = [](const Shape& shape, Type type, Form form, TileSize tile = {128, 64}) {
        Launch launch;
        return Problem(shape, form).plan(tile, type, launch);
    };
    const Shape shape{2, 8, 8, 64, 64};
    report.expect(runs(shape, Type::kBf16, Form::kActivated), "a launch");
    report.expect(!runs(shape, Type::kFp32, Form::kActivated), "no launch in fp32");
    report.expect(!runs(shape, Type::kBf16, Form::kGradient), "no launch of fprop on a gradient");
    report.expect(!runs(shape, Type::kBf16, Form::kPlain, {128, 96}), "no launch of an unknown tile");
    report.expect(!runs({2, 8, 8, 64, 64, 1, 1, 2}, Type::kBf16, Form::kPlain), "no launch with groups");
    report.expect(!runs({2, 8, 8, 12, 64}, Type::kBf16, Form::kPlain), "no launch without whole chunks");
    report.expect(!runs({1, 8, 1000, 64, 64}, Type::kBf16, Form::kPlain), "no launch beyond shared memory");
    settings.capability = 100;
    report.expect(!runs(shape, Type::kBf16, Form::kPlain), "no launch on another chip");
    settings.capability = 90;

    settings.multiprocessors = 132;
    struct Preference {
        Shape shape;
        TileSize best;
    };
    for (const Preference& wanted :
         {Preference{{256, 56, 56, 64, 64}, {256, 64}}, Preference{{256, 28, 28, 128, 128}, {256, 128}},
          Preference{{256, 14, 14, 256, 256}, {256, 128}}, Preference{{256, 7, 7, 512, 512}, {192, 128}},
          Preference{{32, 14, 14, 256, 256}, {128, 128}}, Preference{{32, 7, 7, 512, 512}, {128, 64}}}) {
        Launch best{};
        for (const TileSize tile : kTiles) {
            Launch launch;
            const bool plans = Problem(wanted.shape, Form::kActivated).plan(tile, Type::kBf16, launch);
            if (plans && (best.cycles == 0 || launch.cycles < best.cycles)) best = launch;
        }
        report.expect(best.config.rows == wanted.best.rows && best.config.columns == wanted.best.columns,
                      "tile for images of " + std::to_string(wanted.shape.height) + ": got " +
                          std::to_string(best.config.rows) + " x " + std::to_string(best.config.columns));
    }
}

}  // namespace

int main(int argc, char** argv) {
    Report report;
    run_cases(fprop_cases(), dgrad_cases(), kKernels, argc > 1 ? std::atoi(argv[1]) : 1, report);
    check_plans(report);
    return report.result("Hopper fprop and dgrad");
}
