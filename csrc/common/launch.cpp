#include "common/launch.h"

#include <map>
#include <mutex>
#include <set>
#include <tuple>

namespace resnet_fused {

namespace {

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    RESNET_FUSED_CUDA(cudaDeviceGetAttribute(&value, name, device));
    return value;
}

int current_device() {
    int device = 0;
    RESNET_FUSED_CUDA(cudaGetDevice(&device));
    return device;
}

}  // namespace

int multiprocessors(int device) {
    return attribute(cudaDevAttrMultiProcessorCount, device);
}

int capability(int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
}

std::size_t shared_limit(int device) {
    return static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

void allow_shared(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::tuple<const void*, int>> allowed;
    const int device = current_device();
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device}) != 0) return;
    RESNET_FUSED_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_limit(device))));
    allowed.emplace(kernel, device);
}

int blocks_per_multiprocessor(const void* kernel, unsigned block, std::size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, unsigned, std::size_t>, int> known;
    allow_shared(kernel);
    const std::tuple<const void*, int, unsigned, std::size_t> key(kernel, current_device(), block, shared_bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    int blocks = 0;
    RESNET_FUSED_CUDA(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(block), shared_bytes));
    known.emplace(key, blocks);
    return blocks;
}

}  // namespace resnet_fused
