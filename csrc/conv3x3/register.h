// The Python side of the 3x3 convolutions.

#pragma once

namespace pybind11 {
class module_;
}

namespace resnet_fused::conv3x3 {

void register_conv3x3(pybind11::module_& module);

}  // namespace resnet_fused::conv3x3
