"""cuDNN's fused convolutions as a peer of the kernels.

Inference: PyTorch's ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``. Training: graphs of the package
nvidia-cudnn-frontend: scale, bias, ReLU, convolution and the sums of its output in one, and the weight's gradient with
scale, bias and ReLU on its input. The frontend's Python interface has no graph for dgrad with a ReLU and a norm's sums.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from harness.eager import Call, masker, output_gradient

DIRECTIONS = ("fprop", "infer", "dgrad", "wgrad")
PACKAGE = "nvidia-cudnn-frontend"


def prepare(op: str, a: Any) -> Call:
    """cuDNN's kernel for one call of ``op``.

    Raises:
        NotImplementedError: there is none, or not here.
    """
    reason = unavailable(op, a)
    if reason is not None:
        raise NotImplementedError(f"cudnn: {reason}")
    return {"infer": _infer, "fprop": _fprop, "wgrad": _wgrad}[op.rpartition("_")[2]](a)


def read(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of a call by the names of the op's; cuDNN's variance is E[y^2] - E[y]^2, and left to its users."""
    if "sum" not in found:
        return found
    y = found["y"]
    return {"y": y, "mean": found["sum"].view(-1) / (y.numel() // y.shape[1])}


def unavailable(op: str, a: Any) -> str | None:
    """Why cuDNN cannot run this call here; None if it can."""
    direction = op.rpartition("_")[2]
    if not a.x.is_cuda:
        return "needs a CUDA GPU"
    if direction == "infer":
        if a.scale is not None or a.out_slope is not None or not a.relu:
            return "its inference kernels have a ReLU on the output and nothing on the input"
        return None
    if direction == "dgrad":
        return "its Python frontend has no graph for dgrad with a ReLU and a norm's sums"
    if a.slope is not None:
        return "its graphs have no PReLU"
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    return None


# --- inference: PyTorch's own bindings ------------------------------------------------------------------------------


def _infer(a: Any) -> Call:
    bias = a.bias.to(a.x.dtype)
    padding = a.dilation * (a.weight.shape[-1] - 1) // 2
    rest = (bias, [a.stride] * 2, [padding] * 2, [a.dilation] * 2, a.groups)
    if a.residual is None:
        return lambda: {"y": torch.cudnn_convolution_relu(a.x, a.weight, *rest)}
    return lambda: {"y": torch.cudnn_convolution_add_relu(a.x, a.weight, a.residual, 1.0, *rest)}


# --- training: graphs of the frontend -------------------------------------------------------------------------------


class _Graph:
    """One graph while it is built, and its run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.cudnn: Any = importlib.import_module("cudnn")
        types = self.cudnn.data_type
        self.handle = _handle()
        self.graph = self.cudnn.pygraph(
            io_data_type={torch.float16: types.HALF, torch.bfloat16: types.BFLOAT16, torch.float32: types.FLOAT}[dtype],
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )
        self.bound: dict[Any, Tensor] = {}
        self.workspace: Tensor | None = None

    def input(self, t: Tensor, name: str) -> Any:
        node = self.graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=t.dtype)
        self.bound[node] = t
        return node

    def output(self, node: Any, t: Tensor) -> None:
        types = self.cudnn.data_type
        node.set_output(True).set_dim(list(t.shape)).set_stride(list(t.stride()))
        if t.dtype == torch.float32:
            node.set_data_type(types.FLOAT)
        self.bound[node] = t

    def activation(self, a: Any) -> Any:
        """``relu(x * scale + shift)``, or ``x``."""
        x = self.input(a.x, "x")
        if a.scale is None:
            return x
        scale, shift = (v.to(a.x.dtype).view(1, -1, 1, 1) for v in (a.scale, a.shift))
        scaled = self.graph.scale(name="scale", input=x, scale=self.input(scale, "scale_vector"))
        shifted = self.graph.bias(name="bias", input=scaled, bias=self.input(shift, "shift_vector"))
        return self.graph.relu(name="relu", input=shifted)

    def build(self) -> None:
        """Choose an engine.

        Raises:
            NotImplementedError: cuDNN has none for this graph.
        """
        modes = self.cudnn.heur_mode
        try:
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([modes.A, modes.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
        except self.cudnn.cudnnGraphNotSupportedError as error:
            raise NotImplementedError(f"cudnn: {' '.join(str(error).split())[:200]}") from error
        size = max(1, self.graph.get_workspace_size())
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def run(self) -> None:
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute(self.bound, self.workspace, handle=self.handle)


@functools.cache
def _handle() -> Any:
    return importlib.import_module("cudnn").create_handle()


def _window(a: Any) -> dict[str, list[int]]:
    padding = a.dilation * (a.weight.shape[-1] - 1) // 2
    return {"padding": [padding] * 2, "stride": [a.stride] * 2, "dilation": [a.dilation] * 2}


def _fprop(a: Any) -> Call:
    graph = _Graph(a.x.dtype)
    pixels = [(size - 1) // a.stride + 1 for size in a.x.shape[2:]]
    shape = a.x.shape[0], a.weight.shape[0], *pixels
    y = torch.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)
    weight = graph.input(a.weight.contiguous(memory_format=torch.channels_last), "weight")
    node = graph.graph.conv_fprop(image=graph.activation(a), weight=weight, **_window(a))
    graph.output(node, y)
    if not a.statistics:
        graph.build()
        return lambda: (graph.run(), {"y": y})[1]
    total, squares = (y.new_empty((1, y.shape[1], 1, 1), dtype=torch.float32) for _ in range(2))
    for sums, t in zip(graph.graph.genstats(name="genstats", input=node), (total, squares), strict=True):
        graph.output(sums, t)
    graph.build()
    return lambda: (graph.run(), {"y": y, "sum": total})[1]


def _wgrad(a: Any) -> Call:
    graph = _Graph(a.x.dtype)
    dy = output_gradient(a)(masker(a.sign, a.dz)(a.dz)).contiguous(memory_format=torch.channels_last)
    dw = torch.empty_like(a.weight, memory_format=torch.channels_last)
    loss = graph.input(dy, "dy")
    node = graph.graph.conv_wgrad(image=graph.activation(a), loss=loss, **_window(a))
    graph.output(node, dw)
    graph.build()
    return lambda: (graph.run(), {"dw": dw})[1]
