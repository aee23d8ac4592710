// The tensor maps of one problem's launches, kept by the addresses that they hold.

#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "conv3x3/launch.h"

namespace resnet_fused::conv3x3 {

// Shapes and strides are the problem's, so a map holds nothing else that changes: an entry is right for as long as it
// is kept, whatever becomes of the memory at its addresses.
class MapCache {
  public:
    ConvMaps find(const Launch& launch, Type type, Direction direction, const ConvParams& params);

  private:
    struct Entry {
        const void* values;
        const void* partner;
        const void* weight;
        ConvMaps maps;
    };
    static constexpr std::size_t kEntries =
        64;  // the layers that share a problem, and the buffers that these are given

    std::mutex mutex_;
    std::vector<Entry> entries_;
    std::size_t oldest_ = 0;
};

}  // namespace resnet_fused::conv3x3
