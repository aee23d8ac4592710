// Devices as the driver tells them, for `resnet_fused info` and for the device guard.

#pragma once

namespace pybind11 {
class module_;
}

namespace resnet_fused {

// Whether the process already uses this device (its primary context is active).
bool has_context(int device);

void register_device(pybind11::module_& module);

}  // namespace resnet_fused
