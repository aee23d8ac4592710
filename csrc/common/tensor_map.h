// Tensor maps: what the tensor memory accelerator must know of a tensor in global memory.

#pragma once

#include <cuda.h>  // types alone: libcuda is never linked

#include <cstdint>

namespace resnet_fused {

// Describes a tensor of 16-bit elements (CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 or _FLOAT16) and the box that one copy moves,
// innermost dimension first, with the 128-byte swizzle; elements outside the tensor read as zero.
//     rank     2 or 3
//     dims     (rank,) elements; strides_bytes (rank - 1,) of the dimensions but the innermost, multiples of 16
//     box      (rank,) elements, at most 256 each; the innermost 64 (128 bytes)
// Throws std::runtime_error where the driver has no tensor maps or declines this one.
void encode_tiled(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* base, const std::uint64_t* dims,
                  const std::uint64_t* strides_bytes, const std::uint32_t* box, const char* op);

}  // namespace resnet_fused
