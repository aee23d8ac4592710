// Devices as the driver tells them, for `resnet_fused info`.

#pragma once

namespace pybind11 {
class module_;
}

namespace resnet_fused {

void register_device(pybind11::module_& module);

}  // namespace resnet_fused
