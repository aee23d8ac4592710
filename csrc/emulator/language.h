// What nvcc knows without any include: qualifiers, built-in variables and functions of device code.

#pragma once

#include <cuda_runtime_api.h>  // __global__, __device__, __forceinline__, ... expand to what a host compiler takes

#include <cmath>
#include <type_traits>

#define __launch_bounds__(...)

#define RESNET_FUSED_DEVICE inline

// Those of the fiber that runs; x alone is ever set.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> first = a;
    const std::common_type_t<A, B> second = b;
    return second < first ? second : first;
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> first = a;
    const std::common_type_t<A, B> second = b;
    return first < second ? second : first;
}
