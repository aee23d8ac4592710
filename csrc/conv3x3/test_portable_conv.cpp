// Runs the portable fprop and dgrad in the emulator and compares with the convolution by definition.
//
// Strides, dilations, odd sizes, images smaller than the kernel, channels that fill no chunk, no block or no tile,
// groups, every form of the source, every part of both endings, both feeds, all types; few multiprocessors, so that a
// program walks over several tiles; copies as early and as late as the hardware may make them.

#include <cstdlib>

#include "conv3x3/test_conv.h"

using namespace resnet_fused::conv3x3;
using namespace resnet_fused::conv3x3::test;

namespace {

constexpr ConvKernels kKernels{Chip::kPortable, plan_portable_conv,
                               [](const Launch& launch, Type type, Direction direction, const ConvParams& params) {
                                   run_portable_conv(launch, type, direction, params, nullptr);
                               }};

constexpr Type kAllTypes[] = {Type::kFp16, Type::kBf16, Type::kFp32, Type::kTf32};

std::vector<ConvCase> fprop_cases() {
    std::vector<ConvCase> cases;
    const auto add = [&](const char* why, Shape shape, Type type, auto change) {
        ConvCase test{why, shape, type};
        change(test);
        cases.push_back(test);
    };
    const auto all = [](ConvCase& t) { t.activated = t.statistics = true; };
    for (const Type type : kAllTypes) {
        add("fprop plain", {2, 5, 7, 16, 24}, type, [](ConvCase&) {});
        add("fprop deferred with statistics, several tiles", {3, 9, 11, 72, 72}, type, all);
        add("fprop stride 2 deferred", {2, 7, 6, 24, 16, 2}, type, all);
        add("fprop odd channels", {1, 4, 5, 5, 3}, type, all);
        add("fprop infer", {2, 4, 3, 8, 40}, type, [](ConvCase& t) { t.bias = t.residual = t.relu = true; });
        add("fprop im2col deferred", {2, 5, 6, 72, 16}, type, [&](ConvCase& t) {
            all(t);
            t.feed = Feed::kIm2col;
        });
    }
    const Type bf16 = Type::kBf16;
    const Type fp16 = Type::kFp16;
    for (const std::size_t kib : {66, 58}) {  // three and two stages of weights
        add("fprop with little shared memory", {2, 9, 7, 72, 24}, bf16, [&](ConvCase& t) {
            all(t);
            t.shared_limit = kib * 1024;
        });
    }
    add("fprop wide tile", {2, 12, 13, 64, 136}, bf16, [&](ConvCase& t) {
        all(t);
        t.columns = 128;
    });
    add("fprop wide tile im2col", {2, 6, 7, 40, 136, 2}, fp16, [&](ConvCase& t) {
        all(t);
        t.columns = 128;
        t.feed = Feed::kIm2col;
    });
    add("fprop stride 3", {2, 8, 7, 16, 8, 3}, fp16, all);
    add("fprop stride 3 of an image smaller than that", {5, 2, 2, 16, 8, 3}, fp16, all);
    add("fprop dilation 2", {1, 7, 9, 16, 8, 1, 2}, fp16, all);
    add("fprop stride 2 dilation 2", {1, 7, 9, 16, 8, 2, 2}, fp16, all);
    add("fprop stride 2 dilation 3 im2col", {1, 8, 9, 16, 8, 2, 3}, fp16, [&](ConvCase& t) {
        all(t);
        t.feed = Feed::kIm2col;
    });
    add("fprop one pixel", {3, 1, 1, 8, 8}, bf16, all);
    add("fprop one column", {2, 9, 1, 8, 8}, bf16, all);
    add("fprop groups of 4", {2, 5, 6, 128, 128, 1, 1, 32}, bf16, all);
    add("fprop groups of 8", {1, 5, 6, 72, 72, 2, 1, 9}, bf16, all);
    add("fprop groups of unlike widths", {1, 4, 6, 12, 20, 1, 1, 2}, fp16, all);
    add("fprop depthwise", {1, 5, 5, 70, 70, 1, 1, 70}, fp16, all);
    add("fprop groups in fp32", {1, 5, 5, 24, 12, 2, 1, 3}, Type::kFp32, all);
    add("fprop mean far from 0", {6, 12, 12, 8, 8}, Type::kFp32, [&](ConvCase& t) {
        t.statistics = t.bias = true;
        t.offset = 3000;
    });
    return cases;
}

std::vector<ConvCase> dgrad_cases() {
    std::vector<ConvCase> cases;
    const auto add = [&](const char* why, Shape shape, Type type, auto change) {
        ConvCase test{why, shape, type};
        change(test);
        cases.push_back(test);
    };
    const auto all = [](ConvCase& t) { t.norm = t.deferred = t.sums = t.keep = true; };
    for (const Type type : kAllTypes) {
        add("dgrad plain", {2, 5, 7, 16, 24}, type, [](ConvCase&) {});
        add("dgrad of a norm, deferred, several tiles", {3, 9, 11, 72, 72}, type, all);
        add("dgrad stride 2", {2, 7, 6, 24, 16, 2}, type, all);
        add("dgrad stride 2, bits, skip with bits", {2, 8, 8, 16, 72, 2}, type, [&](ConvCase& t) {
            t.norm = t.skip = t.keep = true;
            t.sign = t.skip_sign = Sign::kBits;
        });
        add("dgrad odd channels, masks of values", {1, 4, 5, 5, 3}, type, [&](ConvCase& t) {
            all(t);
            t.skip = true;
            t.sign = t.skip_sign = Sign::kValues;
        });
        add("dgrad odd channels, masks of bits", {1, 4, 5, 5, 3}, type, [&](ConvCase& t) {
            all(t);
            t.skip = true;
            t.sign = t.skip_sign = Sign::kBits;
        });
        add("dgrad frozen, im2col", {2, 5, 6, 16, 72, 2}, type, [&](ConvCase& t) {
            t.scaled = t.deferred = t.sums = t.keep = true;
            t.feed = Feed::kIm2col;
        });
    }
    const Type bf16 = Type::kBf16;
    const Type fp16 = Type::kFp16;
    add("dgrad wide tile", {2, 12, 13, 136, 64}, bf16, [&](ConvCase& t) {
        all(t);
        t.columns = 128;
    });
    add("dgrad wide tile im2col stride 2", {2, 7, 7, 136, 72, 2}, fp16, [&](ConvCase& t) {
        all(t);
        t.columns = 128;
        t.feed = Feed::kIm2col;
    });
    add("dgrad values mask only", {2, 5, 4, 16, 16}, bf16, [](ConvCase& t) {
        t.sign = Sign::kValues;
        t.keep = true;
    });
    add("dgrad stride 3: pixels without taps", {2, 8, 7, 16, 8, 3}, fp16, all);
    add("dgrad stride 3 dilation 3: classes without taps, skip", {2, 8, 7, 16, 8, 3, 3}, fp16, [&](ConvCase& t) {
        all(t);
        t.skip = true;
    });
    add("dgrad dilation 2", {1, 7, 9, 16, 8, 1, 2}, fp16, all);
    add("dgrad stride 2 dilation 3", {1, 8, 9, 16, 8, 2, 3}, fp16, all);
    add("dgrad one pixel", {3, 1, 1, 8, 8}, bf16, all);
    add("dgrad one pixel stride 2", {3, 1, 1, 8, 8, 2}, bf16, all);
    add("dgrad groups of 4", {2, 5, 6, 128, 128, 1, 1, 32}, bf16, all);
    add("dgrad groups of 8", {1, 5, 6, 72, 72, 2, 1, 9}, bf16, all);
    add("dgrad groups of unlike widths", {1, 4, 6, 12, 20, 1, 1, 2}, fp16, all);
    add("dgrad depthwise", {1, 5, 5, 70, 70, 1, 1, 70}, fp16, all);
    add("dgrad groups in fp32", {1, 5, 5, 24, 12, 2, 1, 3}, Type::kFp32, all);
    return cases;
}

}  // namespace

int main(int argc, char** argv) {
    Report report;
    run_cases(fprop_cases(), dgrad_cases(), kKernels, argc > 1 ? std::atoi(argv[1]) : 1, report);
    return report.result("portable fprop and dgrad");
}
