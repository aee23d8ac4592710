#include "conv3x3/maps.h"

namespace resnet_fused::conv3x3 {

ConvMaps MapCache::find(const Launch& launch, Type type, Direction direction, const ConvParams& params) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Operand& source = params.source;
    for (const Entry& entry : entries_) {
        if (entry.values == source.values && entry.partner == source.partner && entry.weight == params.weight) {
            return entry.maps;
        }
    }
    Entry entry{source.values, source.partner, params.weight, {}};
    encode_sm90_conv(launch, type, direction, params, entry.maps);
    if (entries_.size() < kEntries) {
        entries_.push_back(entry);
    } else {
        entries_[oldest_] = entry;
        oldest_ = (oldest_ + 1) % kEntries;
    }
    return entry.maps;
}

}  // namespace resnet_fused::conv3x3
