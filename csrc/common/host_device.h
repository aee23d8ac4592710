// Functions for device and host: kernels use them, and host tests check them.

#pragma once

#ifdef __CUDACC__
#define RESNET_FUSED_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RESNET_FUSED_HOST_DEVICE inline
#endif
