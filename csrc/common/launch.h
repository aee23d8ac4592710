// What every launch needs: the right device and what it can do, a grid whose size is checked, and the launch's error.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "common/driver.h"
#ifdef RESNET_FUSED_EMULATED
#include "emulator/launch.h"
#endif

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

int multiprocessors(int device);
int capability(int device);            // 90 for 9.0
std::size_t shared_limit(int device);  // bytes of dynamic shared memory that a block can have

// Lets a kernel have all of shared_limit on the current device; asks CUDA once per kernel and device.
void allow_shared(const void* kernel);

// Blocks of a kernel that run at a time on one multiprocessor of the current device; asks CUDA once.
int blocks_per_multiprocessor(const void* kernel, unsigned block, std::size_t shared_bytes);

template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), unsigned block, std::size_t shared_bytes) {
    return blocks_per_multiprocessor(reinterpret_cast<const void*>(kernel), block, shared_bytes);
}

// Enqueues `grid` blocks of `block` threads on `stream`, whose device must be current.
template <class... P>
void launch(void (*kernel)(P...), unsigned grid, unsigned block, std::size_t shared_bytes, cudaStream_t stream,
            const std::common_type_t<P>&... arguments) {
    const auto* const handle = reinterpret_cast<const void*>(kernel);
    allow_shared(handle);
#ifdef RESNET_FUSED_EMULATED
    static_cast<void>(stream);
    emulator::launch(handle, grid, block, shared_bytes, [&] { kernel(arguments...); });
#else
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    RESNET_FUSED_CUDA(cudaLaunchKernel(handle, dim3(grid), dim3(block), pointers, shared_bytes, stream));
#endif
}

}  // namespace resnet_fused
