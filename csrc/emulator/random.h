// A small generator of random numbers (xorshift64*, Vigna 2016), the same on every machine.

#pragma once

#include <cstdint>

namespace resnet_fused::emulator {

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u ^ 0xd1b54a32d192ed03u) {
        if (state_ == 0) state_ = 1;
    }

    // Below `bound`, which is at most 2^32.
    unsigned below(std::uint64_t bound) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<unsigned>((state_ * 0x2545f4914f6cdd1du >> 32) * bound >> 32);
    }

    // The position of one of the bits that are set.
    unsigned bit(std::uint32_t bits) {
        const unsigned turn = below(32);
        const std::uint32_t turned = bits >> turn | bits << (-turn & 31u);
        return (static_cast<unsigned>(__builtin_ctz(turned)) + turn) % 32;
    }

  private:
    std::uint64_t state_;
};

}  // namespace resnet_fused::emulator
