// The module _emulated: the 3x3 convolutions of resnet_fused._C, with kernels that run on the CPU. Addresses are those
// of the CPU's memory, the device and the stream are 0. For tests.

#include <pybind11/pybind11.h>

#include "conv3x3/register.h"
#include "emulator/emulator.h"

namespace py = pybind11;
namespace emulator = resnet_fused::emulator;

PYBIND11_MODULE(_emulated, module) {
    using namespace py::literals;
    module.doc() = "Kernels of resnet_fused._C, run by an emulator on the CPU.";
    module.attr("emulated") = true;
    resnet_fused::conv3x3::register_conv3x3(module);
    module.def(
        "settings",
        [](bool lazy, std::uint64_t seed, int capability, int multiprocessors, std::size_t shared_limit) {
            const auto mode = lazy ? emulator::Mode::lazy : emulator::Mode::eager;
            emulator::settings() = {mode, seed, capability, multiprocessors, shared_limit};
        },
        "The emulated device for what follows: when asynchronous work takes effect, the seed of the order of threads, "
        "and\n"
        "what the device has. Objects that were made for another device stay what they are.",
        py::kw_only(), "lazy"_a = false, "seed"_a = 1, "capability"_a = 90, "multiprocessors"_a = 3,
        "shared_limit"_a = 227 * 1024);
}
