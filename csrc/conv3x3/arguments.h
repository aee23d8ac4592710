// What Python gives for a 3x3 convolution, checked: names and sizes.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "common/check.h"
#include "conv3x3/launch.h"

namespace resnet_fused::conv3x3 {

// In the order of the enumerations.
constexpr std::array<const char*, 4> kTypes = {"fp16", "bf16", "fp32", "tf32"};
constexpr std::array<const char*, 3> kOuts = {"fp16", "bf16", "fp32"};
constexpr std::array<const char*, 3> kSigns = {"none", "bits", "values"};
constexpr std::array<const char*, 2> kChips = {"portable", "hopper"};
constexpr std::array<const char*, 2> kFeeds = {"halo", "im2col"};

template <class Enum, std::size_t kCount>
Enum named(const std::array<const char*, kCount>& names, const std::string& name, const char* op,
           const char* argument) {
    const auto found = std::find(names.begin(), names.end(), name);
    std::string requirement = "to be one of";
    for (const char* const known : names) {
        requirement += std::string(known == names.front() ? " " : ", ") + known;
    }
    check(found != names.end(), op, argument, requirement.c_str(), name);
    return static_cast<Enum>(found - names.begin());
}

// A configuration as Python has it: chip, rows, columns, feed.
using ConfigTuple = std::tuple<std::string, int, int, std::string>;

inline ConfigTuple as_tuple(const Config& config) {
    return {kChips[static_cast<int>(config.chip)], config.rows, config.columns, kFeeds[static_cast<int>(config.feed)]};
}

inline std::string text(const ConfigTuple& config) {
    const auto& [chip, rows, columns, feed] = config;
    return "(" + chip + ", " + std::to_string(rows) + ", " + std::to_string(columns) + ", " + feed + ")";
}

constexpr std::uintptr_t kVectorBytes = 16;

// A convolution whose sizes are known to fit.
struct Problem {
    Type type;
    Geometry geometry;
    int channels, filters, groups;
    int device;

    std::uintptr_t element_bytes() const { return type == Type::kFp16 || type == Type::kBf16 ? 2 : 4; }
    // Whether rows of so many channels are read 16 bytes at a time.
    bool vector(int row) const { return row % (kVectorBytes / element_bytes()) == 0; }
    // Of a tensor whose rows have so many channels.
    std::uintptr_t alignment(bool vectors) const { return vectors ? kVectorBytes : element_bytes(); }
};

// Throws std::invalid_argument.
Problem problem_of(const std::string& type, long long images, long long height, long long width, long long channels,
                   long long filters, long long stride, long long dilation, long long groups, int device);

}  // namespace resnet_fused::conv3x3
