// Python entries of the batch norm kernels: they check every argument, then launch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "batch_norm/finalize.h"
#include "common/check.h"
#include "common/launch.h"

namespace resnet_fused {

namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void bn_finalize(Address count, Address mean, Address m2, Address gamma, Address beta, Address scale, Address shift,
                 Address batch_mean, Address rstd, Address var_unbiased, Address workspace, long long tiles,
                 long long channels, double eps, int device, Address stream) {
    constexpr const char* op = "bn_finalize";
    check_size(tiles, op, "tiles");
    check_size(channels, op, "channels");
    check(std::isfinite(eps) && eps >= 0, op, "eps", "to be finite and not negative", eps);
    check(device >= 0, op, "device", "to be the index of a CUDA device", device);
    if (channels == 0) return;

    FinalizeParams params{};
    params.count = pointer<const std::int32_t>(count);
    params.mean = pointer<const float>(mean);
    params.m2 = pointer<const float>(m2);
    params.gamma = pointer<const float>(gamma);
    params.beta = pointer<const float>(beta);
    params.scale = pointer<float>(scale);
    params.shift = pointer<float>(shift);
    params.batch_mean = pointer<float>(batch_mean);
    params.rstd = pointer<float>(rstd);
    params.var_unbiased = pointer<float>(var_unbiased);
    params.workspace = pointer<void>(workspace);
    params.tiles = static_cast<int>(tiles);
    params.channels = static_cast<int>(channels);
    params.eps = static_cast<float>(eps);
    if (tiles > 0) {
        check_pointer(params.count, op, "count");
        check_pointer(params.mean, op, "mean");
        check_pointer(params.m2, op, "m2");
    }
    check_pointer(params.scale, op, "scale");
    check_pointer(params.shift, op, "shift");
    check_pointer(params.batch_mean, op, "batch_mean");
    check_pointer(params.rstd, op, "rstd");
    check_pointer(params.var_unbiased, op, "var_unbiased");
    if (finalize_workspace(params.tiles, params.channels) > 0) {
        check_pointer(params.workspace, op, "workspace");
        check(workspace % sizeof(std::int64_t) == 0, op, "workspace", "to be aligned to 8 bytes", workspace);
    }

    const DeviceGuard guard(device);
    launch_finalize(params, reinterpret_cast<cudaStream_t>(stream));
}

std::size_t bn_finalize_workspace(long long tiles, long long channels) {
    check_size(tiles, "bn_finalize_workspace", "tiles");
    check_size(channels, "bn_finalize_workspace", "channels");
    return finalize_workspace(static_cast<int>(tiles), static_cast<int>(channels));
}

std::optional<std::string> bn_finalize_unsupported(int device) {
    check(device >= 0, "bn_finalize_unsupported", "device", "to be the index of a CUDA device", device);
    const DeviceGuard guard(device);
    const std::string reason = finalize_unsupported();
    if (reason.empty()) return std::nullopt;
    return reason;
}

}  // namespace

void register_batch_norm(py::module_& module) {
    using namespace py::literals;
    module.def("bn_finalize", &bn_finalize,
               "Merges the statistics of tiles; csrc/batch_norm/finalize.cu has the formula.\n\n"
               "Device pointers as integers: count (T,) int32; mean, m2 (T, C) fp32; gamma, beta (C,) fp32 or 0 for\n"
               "ones and zeros; results scale, shift, batch_mean, rstd, var_unbiased (C,) fp32; workspace of\n"
               "bn_finalize_workspace(T, C) bytes. Enqueued on `stream` (a cudaStream_t) of `device`; does not wait.\n"
               "Raises ValueError before any launch, RuntimeError for what CUDA reports.",
               "count"_a, "mean"_a, "m2"_a, "gamma"_a, "beta"_a, "scale"_a, "shift"_a, "batch_mean"_a, "rstd"_a,
               "var_unbiased"_a, "workspace"_a, "tiles"_a, "channels"_a, "eps"_a, "device"_a, "stream"_a);
    module.def("bn_finalize_workspace", &bn_finalize_workspace, "Bytes of workspace that bn_finalize needs.", "tiles"_a,
               "channels"_a);
    module.def("bn_finalize_unsupported", &bn_finalize_unsupported,
               "None, or CUDA's text for why `device` cannot run bn_finalize.", "device"_a);
}

}  // namespace resnet_fused
