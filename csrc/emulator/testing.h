// What the tests of the wrappers share. They are CUDA programs: by nvcc for a GPU, by the host's compiler for the
// emulator.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/numeric.h"
#ifdef RESNET_FUSED_EMULATED
#include "emulator/emulator.h"
#endif

namespace resnet_fused::testing {

struct Result {
    long checks = 0;
    long failures = 0;
};

inline Result result;
inline std::string order;  // what runs: mode and seed

inline void expect(bool holds, const std::string& what) {
    ++result.checks;
    if (holds) return;
    constexpr long kShown = 20;
    if (++result.failures <= kShown) std::printf("%s: %s\n", order.c_str(), what.c_str());
}

// As numbers: 0 equals -0, and NaN nothing.
template <class T>
void expect_equal(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
    std::size_t i = 0;
    while (i < want.size() && i < got.size() && got[i] == want[i])
        ++i;
    expect(i == want.size() && got.size() == want.size(),
           what + ": differs at " + std::to_string(i) +
               (i < got.size() && i < want.size() ? ", " + std::to_string(got[i]) + " for " + std::to_string(want[i])
                                                  : ""));
}

// Memory of the device.
template <class T>
class Device {
  public:
    explicit Device(std::size_t count) : count_(count) {
        void* memory = nullptr;
        RESNET_FUSED_CUDA(cudaMalloc(&memory, count * sizeof(T)));
        data_ = static_cast<T*>(memory);
    }
    explicit Device(const std::vector<T>& values) : Device(values.size()) {
        RESNET_FUSED_CUDA(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Device() { cudaFree(data_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    T* data() const { return data_; }
    std::vector<T> host() const {
        std::vector<T> values(count_);
        RESNET_FUSED_CUDA(cudaDeviceSynchronize());
        RESNET_FUSED_CUDA(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

  private:
    T* data_ = nullptr;
    std::size_t count_;
};

// Small integers: sums of their products are exact in fp32, in any order.
template <class T>
std::vector<T> small_integers(std::size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<T> values(count);
    for (T& value : values) {
        value = from_float<T>(static_cast<float>(static_cast<int>(random() % 17) - 8));
    }
    return values;
}

// Emulated, in both modes and for several seeds; else once.
template <class Run>
void in_every_order(int seeds, Run run) {
#ifdef RESNET_FUSED_EMULATED
    for (const emulator::Mode mode : {emulator::Mode::eager, emulator::Mode::lazy}) {
        for (int seed = 1; seed <= seeds; ++seed) {
            emulator::settings().mode = mode;
            emulator::settings().seed = static_cast<std::uint64_t>(seed);
            order = std::string(mode == emulator::Mode::eager ? "eager" : "lazy") + ", seed " + std::to_string(seed);
            run();
        }
    }
#else
    static_cast<void>(seeds);
    order = "on the GPU";
    run();
#endif
}

// The exit status of main.
inline int report(const char* name) {
    std::printf("%s: %ld checks, %ld failures\n", name, result.checks, result.failures);
    return result.failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace resnet_fused::testing
