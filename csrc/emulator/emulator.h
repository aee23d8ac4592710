// Runs the CUDA kernels of csrc on the CPU, for tests on machines without a GPU: what tests and bindings see of it.
//
// The kernels are compiled by the host's compiler with RESNET_FUSED_EMULATED, and then common/mma.h and common/sm90.h
// are the functions of this folder. A thread is a fiber, the threads of a block take turns, and the blocks run one
// after the other, all in an order drawn from the seed. What the hardware does asynchronously takes effect
//     eager  where it is issued, or
//     lazy   as late as allowed: cp.async at its wait; copies that complete on a barrier, once every thread waits; and
//            wgmma reads its registers and shared memory, and writes its accumulators, at its wait.
// A correct kernel gives the same bits in both modes and for every seed. Shared memory starts as NaN. An Error says
// what a GPU would have punished: see block.h, shared.h, races.h, copies.h and products.h. Global memory is the CPU's,
// and the compiler's address sanitizer can watch it. Not here: anything between blocks that run at a time, and limits
// of registers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace resnet_fused::emulator {

enum class Mode { eager, lazy };

// The emulated device, for the launches that follow.
struct Settings {
    Mode mode = Mode::eager;
    std::uint64_t seed = 1;
    int capability = 90;  // 10 * major + minor
    int multiprocessors = 3;
    std::size_t shared_limit = 227 * 1024;  // bytes a block can have
};

Settings& settings();

class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace resnet_fused::emulator
