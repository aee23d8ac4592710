// What the tests of wrong kernels share: one set of arguments for all of them, and what must come of a kernel in both
// modes and in every order. Where nothing but the result can tell that a kernel is wrong, it must be wrong in the lazy
// mode and right in the eager one.

#pragma once

#include <string>
#include <vector>

#include "common/launch.h"
#include "common/sm90.h"
#include "common/tensor_map.h"
#include "emulator/testing.h"

namespace resnet_fused::testing {

constexpr unsigned kWarp = 32;
constexpr unsigned kGroup = 128;
constexpr int kSeeds = 4;
constexpr std::size_t kShared = 32 * 1024;

struct Params {
    CUtensorMap map;    // of 64 x 64 ones
    const float* ones;  // 1024 of them
    float* result;      // 0 before each launch
    int value;
};

inline std::uint32_t base() {
    return shared_address(shared_memory());
}

class Fixture {
  public:
    Fixture() : ones_(std::vector<float>(1024, 1.0f)), tensor_(std::vector<Bf16>(64 * 64, from_float<Bf16>(1.0f))) {
        constexpr std::uint64_t kDims[2] = {64, 64};
        constexpr std::uint64_t kStrides[1] = {128};
        constexpr std::uint32_t kBox[2] = {64, 64};
        encode_tiled(&params_.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, tensor_.data(), kDims, kStrides, kBox, "test");
        params_.ones = ones_.data();
        params_.result = &result_;
    }

    // The kernel's Error, or its result as text.
    std::string run(void (*kernel)(Params), unsigned threads, int value) {
        result_ = 0;
        params_.value = value;
        try {
            launch(kernel, 1, threads, kShared, nullptr, params_);
        } catch (const emulator::Error& error) {
            return error.what();
        }
        return std::to_string(result_);
    }

  private:
    Device<float> ones_;
    Device<Bf16> tensor_;
    Params params_{};
    float result_ = 0;
};

// The kernel's Error, or its result, has this text in it.
inline void gives(const char* what, const std::string& text, void (*kernel)(Params), unsigned threads, int value = 0) {
    in_every_order(kSeeds, [&] {
        const std::string got = Fixture().run(kernel, threads, value);
        expect(got.find(text) != std::string::npos, std::string(what) + ": expected \"" + text + "\", got " + got);
    });
}

// `value` 0 makes the kernel right: its result is 1 then. With 1 it is in the eager mode alone.
inline void wrong_when_lazy(const char* what, void (*kernel)(Params), unsigned threads) {
    const std::string right = std::to_string(1.0f);
    in_every_order(kSeeds, [&] {
        const bool lazy = emulator::settings().mode == emulator::Mode::lazy;
        expect(Fixture().run(kernel, threads, 0) == right, std::string(what) + ": right");
        expect((Fixture().run(kernel, threads, 1) == right) != lazy,
               std::string(what) + ": wrong in the lazy mode alone");
    });
}

}  // namespace resnet_fused::testing
