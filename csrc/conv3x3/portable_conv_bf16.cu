#include "conv3x3/portable_conv_types.cuh"

namespace resnet_fused::conv3x3 {

template void launch_portable_conv<Type::kBf16>(const Launch&, Direction, const PortableParams&, cudaStream_t);
template int portable_conv_on_multiprocessor<Type::kBf16>(const Config&, Direction, std::size_t);

}  // namespace resnet_fused::conv3x3
