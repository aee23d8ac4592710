// The functions of the CUDA runtime that the host code of csrc calls, for a device that is the emulator: one device,
// one stream, nothing asynchronous. Hidden, so that a process that has the CUDA runtime keeps it.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

#include "emulator/block.h"
#include "emulator/launch.h"
#include "emulator/tensor_map.h"

namespace resnet_fused::emulator {

namespace {

constexpr std::size_t kSharedDefault = 48 * 1024;  // bytes without cudaFuncSetAttribute
constexpr unsigned kMostThreads = 1024;

std::recursive_mutex mutex;
std::set<const void*> opted_in;  // kernels that may have more than kSharedDefault
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

CUresult context_state(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

void* driver_function(const char* name) {
    if (std::strcmp(name, "cuTensorMapEncodeTiled") == 0) return reinterpret_cast<void*>(&encode_tiled_map);
    if (std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0) return reinterpret_cast<void*>(&context_state);
    return nullptr;
}

}  // namespace

void launch(const void* kernel, unsigned grid, unsigned threads, std::size_t shared_bytes,
            const std::function<void()>& thread) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const std::size_t limit = opted_in.count(kernel) != 0 ? settings().shared_limit : kSharedDefault;
    if (grid == 0) throw Error("launch: no blocks");
    if (threads == 0 || threads > kMostThreads || threads % kLanes != 0) {
        throw Error("launch: " + std::to_string(threads) + " threads a block, expected whole warps, at most 1024");
    }
    if (shared_bytes > limit) {
        throw Error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory, the kernel may have " +
                    std::to_string(limit));
    }
    block().run(grid, threads, shared_bytes, thread);
}

}  // namespace resnet_fused::emulator

#pragma GCC visibility push(hidden)

using resnet_fused::emulator::result;
using resnet_fused::emulator::settings;

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return result(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = settings().multiprocessors;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = settings().capability / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = settings().capability % 10;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(settings().shared_limit);
            return cudaSuccess;
        default:
            return result(cudaErrorInvalidValue);
    }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return result(cudaErrorInvalidValue);
    if (value < 0 || static_cast<std::size_t>(value) > settings().shared_limit) return result(cudaErrorInvalidValue);
    const std::lock_guard<std::recursive_mutex> lock(resnet_fused::emulator::mutex);
    resnet_fused::emulator::opted_in.insert(kernel);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t shared_bytes) {
    *blocks = shared_bytes <= settings().shared_limit ? 1 : 0;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    constexpr std::size_t kAlignment = 256;
    if (posix_memalign(memory, kAlignment, bytes) != 0) return result(cudaErrorMemoryAllocation);
    std::memset(*memory, 0xff, bytes);  // NaN until somebody writes
    return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t status = resnet_fused::emulator::last_error;
    resnet_fused::emulator::last_error = cudaSuccess;
    return status;
}

const char* cudaGetErrorName(cudaError_t status) {
    return status == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidValue";
}

const char* cudaGetErrorString(cudaError_t) {
    return "declined by the emulator";
}

namespace {

cudaError_t entry_point(const char* name, void** function, cudaDriverEntryPointQueryResult* found) {
    *function = resnet_fused::emulator::driver_function(name);
    *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

}  // namespace

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    return entry_point(name, function, found);
}
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
    return entry_point(name, function, found);
}
#endif

#pragma GCC visibility pop
