#include "common/device.h"

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "common/check.h"

namespace resnet_fused {

namespace {

namespace py = pybind11;

py::dict properties(int device) {
    cudaDeviceProp prop{};
    RESNET_FUSED_CUDA(cudaGetDeviceProperties(&prop, device));
    py::dict result;
    result["name"] = std::string(prop.name);
    result["capability"] = py::make_tuple(prop.major, prop.minor);
    result["multiprocessors"] = prop.multiProcessorCount;
    result["shared_memory_per_block"] = prop.sharedMemPerBlockOptin;
    result["l2_cache"] = prop.l2CacheSize;
    result["memory"] = prop.totalGlobalMem;
    return result;
}

// Never throws: an absent or too old driver is an answer, not an error.
py::dict device_info() {
    py::dict info;
    int driver = 0;
    int runtime = 0;
    int count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const cudaError_t status = cudaGetDeviceCount(&count);
    info["driver_version"] = py::make_tuple(driver / 1000, driver % 1000 / 10);
    info["runtime_version"] = py::make_tuple(runtime / 1000, runtime % 1000 / 10);
    info["error"] = py::none();
    py::list devices;
    if (status != cudaSuccess) {
        info["error"] = std::string(cudaGetErrorString(status));
        cudaGetLastError();
        count = 0;
    }
    for (int device = 0; device < count; ++device) {
        devices.append(properties(device));
    }
    info["devices"] = devices;
    return info;
}

}  // namespace

void register_device(py::module_& module) {
    module.def("device_info", &device_info,
               "The CUDA devices as this extension sees them.\n\n"
               "Returns a dict: `devices` (a list of dicts: name, capability (major, minor), multiprocessors,\n"
               "shared_memory_per_block [bytes, opt-in], l2_cache [bytes], memory [bytes]), `driver_version` and\n"
               "`runtime_version` (major, minor; (0, 0) for no driver), `error` (the driver's text, or None).");
}

}  // namespace resnet_fused
