// In place of the sm_90a kernels where the extension is not built for them: no problem is planned, so none is run.

#include "conv3x3/launch.h"

namespace resnet_fused::conv3x3 {

bool plan_sm90_conv(const Config&, Type, Direction, const ConvParams&, int, Launch&) {
    return false;
}

void encode_sm90_conv(const Launch&, Type, Direction, const ConvParams&, ConvMaps&) {}

void run_sm90_conv(const Launch&, Type, Direction, const ConvParams&, const ConvMaps&, cudaStream_t) {}

bool plan_sm90_wgrad(const Config&, Type, const WgradParams&, int, Launch&) {
    return false;
}

void run_sm90_wgrad(const Launch&, Type, const WgradParams&, cudaStream_t) {}

}  // namespace resnet_fused::conv3x3
