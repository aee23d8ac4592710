// The Python side of the 3x3 convolutions.

#include "conv3x3/register.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "conv3x3/launchers.h"

namespace resnet_fused::conv3x3 {

namespace {

namespace py = pybind11;

template <class Direction, class... Arguments>
std::unique_ptr<Direction> make(const Problem& problem, Arguments... arguments) {
    return std::make_unique<Direction>(problem, arguments...);
}

// What the three classes have in common.
template <class Direction, class Run>
py::class_<Direction> define(py::module_& module, const char* name, const char* doc, Run run, const char* run_doc) {
    return py::class_<Direction>(module, name, doc, py::module_local())
        .def_property_readonly("configs", &Direction::configs,
                               "What runs the problem on its device, the default first: (chip, rows, columns, feed).")
        .def_property_readonly("config", &Direction::config, "The configuration that was taken, None for none.")
        .def_property_readonly("workspace", &Direction::workspace, "Bytes of workspace that a run needs.")
        .def("run", run, run_doc, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void register_conv3x3(py::module_& module) {
    using namespace py::literals;
    auto fprop = define<Fprop>(
        module, "Conv3x3Fprop", "y = conv2d(x, w) with padding = dilation, and what follows it.", &Fprop::run,
        "Device addresses, 0 for what does not come with the problem: x, scale, shift, weight, bias, residual, out,\n"
        "count, mean, m2, workspace, counters; stream. Enqueues and does not wait. ValueError before any launch.");
    fprop.def_property_readonly("counters", &Fprop::counters, "Zeros (int32) that a run needs, and leaves at zero.");
    auto dgrad = define<Dgrad>(
        module, "Conv3x3Dgrad", "The gradient of the input, and what follows it.", &Dgrad::run,
        "As Conv3x3Fprop.run: dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign; skip_scale;\n"
        "dx, dbeta, dgamma, dy, workspace, counters; stream.");
    dgrad.def_property_readonly("counters", &Dgrad::counters, "Zeros (int32) that a run needs, and leaves at zero.");
    define<Wgrad>(module, "Conv3x3Wgrad", "The gradient of the weight.", &Wgrad::run,
                  "As Conv3x3Fprop.run: dz, sign, y, a, b, c, x, scale, shift, dw, workspace; stream.");

    using AskedConfig = std::optional<ConfigTuple>;
    py::class_<Problem>(module, "Conv3x3",
                        "A 3x3 convolution on one device; csrc/conv3x3/problem.h has the layout of its tensors.\n\n"
                        "type: fp16, bf16, fp32 (three TF32 products each) or tf32 (one); images, height, width,\n"
                        "channels: of the input. Its methods give what runs it: the arguments say what comes with a\n"
                        "run, config is one of `configs`, or None for the first. ValueError for what does not fit.",
                        py::module_local())
        .def(py::init(&problem_of), py::kw_only(), "type"_a, "images"_a, "height"_a, "width"_a, "channels"_a,
             "filters"_a, "stride"_a, "dilation"_a, "groups"_a, "device"_a)
        .def("fprop", &make<Fprop, bool, bool, bool, bool, bool, const AskedConfig&>, py::kw_only(), "deferred"_a,
             "bias"_a, "residual"_a, "relu"_a, "statistics"_a, "config"_a)
        .def("dgrad",
             &make<Dgrad, const std::string&, bool, bool, bool, bool, bool, const std::string&, bool,
                   const AskedConfig&>,
             py::kw_only(), "sign"_a, "factor"_a, "partner"_a, "deferred"_a, "sums"_a, "skip"_a, "skip_sign"_a,
             "keep_dy"_a, "config"_a)
        .def("wgrad", &make<Wgrad, const std::string&, bool, bool, bool, const std::string&, const AskedConfig&>,
             py::kw_only(), "sign"_a, "factor"_a, "partner"_a, "deferred"_a, "out"_a, "config"_a);
}

}  // namespace resnet_fused::conv3x3
