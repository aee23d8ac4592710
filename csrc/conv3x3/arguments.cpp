#include "conv3x3/arguments.h"

namespace resnet_fused::conv3x3 {

namespace {

constexpr long long kLargest = 2147483647;
constexpr long long kBeyond = 4096;  // rows that a tile may reach beyond the last position

}  // namespace

Problem problem_of(const std::string& type, long long images, long long height, long long width, long long channels,
                   long long filters, long long stride, long long dilation, long long groups, int device) {
    constexpr const char* op = "conv3x3";
    const std::tuple<const char*, long long> sizes[] = {
        {"images", images},   {"height", height},     {"width", width},  {"channels", channels},
        {"filters", filters}, {"dilation", dilation}, {"groups", groups}};
    for (const auto& [name, size] : sizes) {
        check(size >= 1 && size <= kLargest, op, name, "to be between 1 and 2147483647", size);
    }
    check(stride >= 1 && stride <= kMaxStride, op, "stride", "to be between 1 and 3", stride);
    check(channels % groups == 0, op, "channels", "to be a multiple of groups", channels);
    check(filters % groups == 0, op, "filters", "to be a multiple of groups", filters);
    check(device >= 0, op, "device", "to be the index of a CUDA device", device);
    // Positions, and how far a tap and a tile may reach beyond them, are counted in 32 bits.
    const bool counted = height <= kLargest / width && images <= kLargest / (height * width) &&
                         dilation <= kLargest / (2 * (width + 1)) &&
                         images * height * width + 2 * dilation * (width + 1) + kBeyond <= kLargest;
    check(counted, op, "images * height * width", "to be counted in 31 bits, a dilation's reach included",
          std::to_string(images) + " * " + std::to_string(height) + " * " + std::to_string(width));
    check(channels / groups <= kLargest / kTaps / filters, op, "filters * 9 * channels / groups",
          "to be at most 2147483647", std::to_string(filters) + " * 9 * " + std::to_string(channels / groups));
    const auto n = [](long long size) { return static_cast<int>(size); };
    return {named<Type>(kTypes, type, op, "type"),
            {n(images), n(height), n(width), n(stride), n(dilation)},
            n(channels),
            n(filters),
            n(groups),
            device};
}

}  // namespace resnet_fused::conv3x3
