// Argument checks and CUDA error checks.
//
// Arguments: std::invalid_argument, which Python sees as ValueError, with the sentence
//     <op>: expected <argument> <requirement>, got <value>
// CUDA: std::runtime_error, which Python sees as RuntimeError, with file, call, and CUDA's own name and text.

#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace resnet_fused {

template <typename Value>
void check(bool holds, const char* op, const char* argument, const char* requirement, const Value& got) {
    if (holds) return;
    std::ostringstream text;
    text << op << ": expected " << argument << " " << requirement << ", got " << got;
    throw std::invalid_argument(text.str());
}

inline void check_pointer(const void* pointer, const char* op, const char* argument) {
    check(pointer != nullptr, op, argument, "to be a device pointer", "a null pointer");
}

// Sizes that a kernel keeps in 32 bits.
inline void check_size(long long size, const char* op, const char* argument) {
    constexpr long long kLargest = 2147483647;
    check(size >= 0 && size <= kLargest, op, argument, "to be between 0 and 2147483647", size);
}

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    std::ostringstream text;
    text << file << ":" << line << ": " << call << ": " << cudaGetErrorName(status) << " ("
         << cudaGetErrorString(status) << ")";
    cudaGetLastError();  // a reported error must not be reported again by the next launch check
    throw std::runtime_error(text.str());
}

}  // namespace resnet_fused

#define RESNET_FUSED_CUDA(call) ::resnet_fused::check_cuda((call), #call, __FILE__, __LINE__)
