// The launch of an emulated kernel, behind resnet_fused::launch.

#pragma once

#include <cstddef>
#include <functional>

#include "emulator/language.h"  // a kernel may need no more than this

namespace resnet_fused::emulator {

// Runs `thread` once for each thread of each block, to the end. `kernel` is its identity only.
void launch(const void* kernel, unsigned grid, unsigned block, std::size_t shared_bytes,
            const std::function<void()>& thread);

}  // namespace resnet_fused::emulator
