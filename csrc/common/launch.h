// What every launch needs: the right device, a grid whose size is checked, and the launch's error.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/check.h"
#include "common/device.h"

namespace resnet_fused {

// Makes `device` current for the guard's lifetime. The previous device is made current again unless it has no context:
// doing so would create one there, which costs some hundred MiB of that GPU's memory.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        RESNET_FUSED_CUDA(cudaGetDevice(&previous_));
        if (previous_ == device) return;
        restore_ = has_context(previous_);
        RESNET_FUSED_CUDA(cudaSetDevice(device));
    }
    ~DeviceGuard() {
        if (restore_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool restore_ = false;
};

inline std::int64_t ceil_div(std::int64_t amount, std::int64_t share) {
    return (amount + share - 1) / share;
}

// Blocks along x for `amount` items, `share` of them per block.
inline unsigned grid_x(std::int64_t amount, std::int64_t share, const char* op, const char* argument) {
    constexpr std::int64_t kLargest = 2147483647;
    const std::int64_t blocks = ceil_div(amount, share);
    check(blocks <= kLargest, op, argument, "to need at most 2147483647 blocks", blocks);
    return static_cast<unsigned>(blocks);
}

// Reports what the launch itself got wrong. It does not wait for the kernel.
#define RESNET_FUSED_CHECK_LAUNCH() RESNET_FUSED_CUDA(cudaGetLastError())

}  // namespace resnet_fused
