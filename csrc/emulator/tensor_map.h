// What the emulator keeps in a CUtensorMap, which is opaque to everybody else. [cuda.h: cuTensorMapEncodeTiled]

#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace resnet_fused::emulator {

constexpr int kMostDimensions = 3;
using Coordinates = std::array<int, kMostDimensions>;  // innermost first, 0 beyond the rank

struct TiledMap {
    std::uint64_t mark;  // kTiledMark
    const unsigned char* base;
    std::int64_t dims[kMostDimensions];         // elements of 16 bits; 1 beyond the rank
    std::int64_t strides[kMostDimensions - 1];  // bytes
    std::int32_t box[kMostDimensions];          // elements; 1 beyond the rank
    std::int32_t rank;

    int rows() const { return box[1] * box[2]; }  // of kRowBytes
};

constexpr std::uint64_t kTiledMark = 0x7265736e65745f66u;
constexpr int kRowBytes = 128;
constexpr int kRowElements = 64;

static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap), "a TiledMap stands in the place of a CUtensorMap");

// The map; an Error if cuTensorMapEncodeTiled did not write it.
const TiledMap& tiled_map(const CUtensorMap* map);

// Where the 16-byte chunk at a shared address stands with the 128-byte swizzle.
constexpr std::uint32_t swizzled(std::uint32_t address) {
    return address ^ ((address >> 7 & 7) << 4);
}

// The 16 bytes of chunk `chunk` of row `row` of the box at these coordinates.
void read_box(const TiledMap& map, const Coordinates& coordinates, int row, int chunk, unsigned char* to);

// In the place of cuTensorMapEncodeTiled: declines what the driver declines, and what the emulator does not know.
CUresult encode_tiled_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                          const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                          const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                          CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // namespace resnet_fused::emulator
