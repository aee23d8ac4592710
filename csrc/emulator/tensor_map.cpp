#include "emulator/tensor_map.h"

#include <cstring>

#include "emulator/block.h"

namespace resnet_fused::emulator {

namespace {

constexpr std::int64_t kElementBytes = 2;
constexpr int kChunkElements = 8;

}  // namespace

const TiledMap& tiled_map(const CUtensorMap* map) {
    const auto& tiled = *reinterpret_cast<const TiledMap*>(map);
    if (tiled.mark != kTiledMark) fail("a tensor map that was not encoded");
    return tiled;
}

void read_box(const TiledMap& map, const Coordinates& coordinates, int row, int chunk, unsigned char* to) {
    const std::int64_t i = std::int64_t{coordinates[1]} + row % map.box[1];
    const std::int64_t j = std::int64_t{coordinates[2]} + row / map.box[1];
    std::memset(to, 0, kChunkElements * kElementBytes);
    if (i < 0 || i >= map.dims[1] || j < 0 || j >= map.dims[2]) return;
    const unsigned char* const from = map.base + i * map.strides[0] + j * map.strides[1];
    for (int element = 0; element < kChunkElements; ++element) {
        const std::int64_t c = std::int64_t{coordinates[0]} + chunk * kChunkElements + element;
        if (c < 0 || c >= map.dims[0]) continue;
        std::memcpy(to + element * kElementBytes, from + c * kElementBytes, kElementBytes);
    }
}

CUresult encode_tiled_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                          const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                          const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                          CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    constexpr std::uintptr_t kMapAlignment = 64;
    constexpr std::uint64_t kAlignment = 16;
    constexpr std::uint64_t kLargestDim = std::uint64_t{1} << 32;
    constexpr std::uint64_t kStrideLimit = std::uint64_t{1} << 40;
    constexpr std::uint32_t kLargestBox = 256;
    const auto address = reinterpret_cast<std::uintptr_t>(base);
    bool valid = reinterpret_cast<std::uintptr_t>(map) % kMapAlignment == 0 && base != nullptr &&
                 address % kAlignment == 0 && (rank == 2 || rank == 3) && box[0] == kRowElements &&
                 (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                 interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                 fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    for (cuuint32_t i = 0; valid && i < rank; ++i) {
        valid = dims[i] >= 1 && dims[i] <= kLargestDim && box[i] >= 1 && box[i] <= kLargestBox &&
                element_strides[i] == 1 &&
                (i == 0 || (strides[i - 1] % kAlignment == 0 && strides[i - 1] < kStrideLimit));
    }
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    TiledMap tiled{kTiledMark, static_cast<const unsigned char*>(base), {1, 1, 1}, {0, 0},
                   {1, 1, 1},  static_cast<std::int32_t>(rank)};
    for (cuuint32_t i = 0; i < rank; ++i) {
        tiled.dims[i] = static_cast<std::int64_t>(dims[i]);
        tiled.box[i] = static_cast<std::int32_t>(box[i]);
        if (i > 0) tiled.strides[i - 1] = static_cast<std::int64_t>(strides[i - 1]);
    }
    *map = CUtensorMap{};
    std::memcpy(static_cast<void*>(map), &tiled, sizeof(tiled));
    return CUDA_SUCCESS;
}

}  // namespace resnet_fused::emulator
