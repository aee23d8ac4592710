// The extension resnet_fused._C: one register call per area. It knows nothing of torch: functions take device pointers
// as integers, sizes, and a stream, and throw on bad arguments.

#include <pybind11/pybind11.h>

#include "batch_norm/finalize.h"
#include "common/device.h"
#include "conv3x3/register.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of resnet_fused, free of torch.";
    module.attr("emulated") = false;
    resnet_fused::register_device(module);
    resnet_fused::register_batch_norm(module);
    resnet_fused::conv3x3::register_conv3x3(module);
}
