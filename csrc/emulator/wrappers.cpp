// What the wrappers need besides the block.

#include "emulator/sm90.h"

namespace resnet_fused::emulator {

namespace {

struct Shuffle {
    std::uint32_t value;
    unsigned source;
    std::uint32_t result;
};

}  // namespace

std::uint32_t shuffle(const char* function, std::uint32_t value, int source) {
    Shuffle own{value, static_cast<unsigned>(source) % kLanes, 0};
    block().collective(function, 0, &own, [](const Operands& lanes) {
        for (void* const lane : lanes) {
            auto* const to = static_cast<Shuffle*>(lane);
            to->result = static_cast<const Shuffle*>(lanes[to->source])->value;
        }
    });
    return own.result;
}

void check_aligned(const char* function, const void* pointer, std::size_t bytes) {
    block().enter(function);
    if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) {
        fail("a global address that is not a multiple of " + std::to_string(bytes));
    }
}

Block& hopper(const char* function) {
    block().enter(function);
    if (settings().capability != 90) fail("needs sm_90a, the device has " + std::to_string(settings().capability));
    return block();
}

}  // namespace resnet_fused::emulator
