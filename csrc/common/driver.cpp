#include "common/driver.h"

#include <cuda.h>  // types only: libcuda is reached through the runtime, never linked
#include <cuda_runtime_api.h>

namespace resnet_fused {

void* driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        return nullptr;
    }
    return function;
}

bool has_context(int device) {
    using State = CUresult (*)(CUdevice, unsigned*, int*);
    static const auto state = reinterpret_cast<State>(driver_function("cuDevicePrimaryCtxGetState"));
    unsigned flags = 0;
    int active = 0;
    return state == nullptr || state(device, &flags, &active) != CUDA_SUCCESS || active != 0;
}

}  // namespace resnet_fused
