#include "common/tensor_map.h"

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/driver.h"

namespace resnet_fused {

void encode_tiled(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* base, const std::uint64_t* dims,
                  const std::uint64_t* strides_bytes, const std::uint32_t* box, const char* op) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const auto encode = reinterpret_cast<Encode>(driver_function("cuTensorMapEncodeTiled"));
    if (encode == nullptr) throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled");
    constexpr std::uint32_t kDense[5] = {1, 1, 1, 1, 1};
    const CUresult status =
        encode(map, type, static_cast<std::uint32_t>(rank), const_cast<void*>(base), dims, strides_bytes, box, kDense,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status == CUDA_SUCCESS) return;
    std::ostringstream text;
    text << op << ": cuTensorMapEncodeTiled: error " << static_cast<int>(status) << " for base " << base;
    for (int i = 0; i < rank; ++i) {
        text << ", dimension " << dims[i] << " (box " << box[i];
        if (i > 0) text << ", stride " << strides_bytes[i - 1] << " bytes";
        text << ")";
    }
    throw std::runtime_error(text.str());
}

}  // namespace resnet_fused
