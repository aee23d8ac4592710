"""Count a whole model: what its fused ops must move, and what PyTorch's own sequence of ops moves, block by block.

The model runs on fake tensors, so no device, memory or time is needed. PyTorch's ops are counted as its kernels on a
GPU read and write: every operand once and every result once, but

- batch norm on batch statistics reads its input twice, and its backward both its operands twice (sums, then the rest);
- ``convolution_backward`` is two kernels, which both read the gradient;
- max-pooling also writes the indices of its winners, and its backward reads those in place of its input;
- views, allocations and whatever does not depend on the images (casts of weights, folding them) are free.

Neither the loss nor the optimizer is counted: backward starts from the output's gradient.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from resnet_fused.blocks.paths import disabled
from resnet_fused.convert import MEMORY, fuse
from resnet_fused.ops import bn_add_relu
from resnet_fused.ops._op import NAMESPACE
from resnet_fused.profiling import blocks
from resnet_fused.traffic.contract import Traffic, of, parts, reached

ZERO = Traffic(0, 0)


@dataclass(frozen=True)
class Row:
    """All calls of one op in one block and phase."""

    block: str  # "" outside of all blocks
    phase: str  # forward, backward
    op: str
    calls: int
    traffic: Traffic

    def to_dict(self) -> dict[str, Any]:
        """With ``bytes`` and ``flops`` beside the rest."""
        return {
            "block": self.block,
            "phase": self.phase,
            "op": self.op,
            "calls": self.calls,
            **asdict(self.traffic),
        }


@dataclass(frozen=True)
class Count:
    """Bytes and FLOPs of one batch; ``str()`` gives the table of blocks in MB an image."""

    mode: str  # train, infer
    images: int
    fused: tuple[Row, ...]
    eager: tuple[Row, ...]

    def total(self, side: str, block: str | None = None, phase: str | None = None) -> Traffic:
        """The sum over ``fused`` or ``eager``, of one block or phase where it is named."""
        rows = (row for row in getattr(self, side) if block in (None, row.block) and phase in (None, row.phase))
        return sum((row.traffic for row in rows), ZERO)

    def blocks(self) -> tuple[str, ...]:
        """The blocks' names, in the order in which they run."""
        return tuple(dict.fromkeys(row.block for row in (*self.fused, *self.eager)))

    def to_dict(self) -> dict[str, Any]:
        """Totals and rows, bytes and FLOPs of the whole batch."""
        totals = {side: asdict(self.total(side)) for side in ("fused", "eager")}
        rows = {"fused": [row.to_dict() for row in self.fused], "eager": [row.to_dict() for row in self.eager]}
        return {"mode": self.mode, "images": self.images, "totals": totals, "rows": rows}

    def __str__(self) -> str:
        def line(name: str, block: str | None) -> str:
            fused, eager = (self.total(side, block) for side in ("fused", "eager"))
            ratio = f"{eager.bytes / fused.bytes:.2f}" if fused.bytes else ""
            per_image = (f"{t.bytes / self.images / 1e6:.3f}" for t in (fused, eager))
            gflop = f"{fused.flops / self.images / 1e9:.3f}"
            return "{:<16} {:>12} {:>12} {:>7} {:>12}".format(name, *per_image, ratio, gflop)

        header = "{:<16} {:>12} {:>12} {:>7} {:>12}".format("block", "MB an image", "eager", "ratio", "GFLOP")
        lines = [line(name or "(outside)", name) for name in self.blocks()]
        return "\n".join([header, *lines, line("all", None)])


def count(model: nn.Module, x: Tensor, mode: str = "train") -> Count:
    """Count a training step (without loss and optimizer) or inference of ``model``, fused and eager.

    ``bprop`` counts as the dgrad and the wgrad that it stands for. Masks count as the 1 bit that they have on a GPU.

    Args:
        model: any module; a copy of it is fused and run, it stays as it is. Blocks that were fused to recompute do so,
            which counts in backward.
        x: an input, of which shape, dtype, memory format and ``requires_grad`` matter.
        mode: ``train`` or ``infer``.
    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ("train", "infer"):
        raise ValueError(f"count: expected mode to be train or infer, got {mode!r}")
    twin = copy.deepcopy(model).cpu().train(mode == "train")
    for memory in MEMORY:
        fuse(twin, memory=memory, filter_fn=functools.partial(_keeps, memory))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad)
        with bn_add_relu.packed_masks():
            fused = _run(twin, images, mode)
        with disabled():
            eager = _run(twin, images, mode)
    return Count(mode, x.shape[0], fused, eager)


def _keeps(memory: str, name: str, module: nn.Module) -> bool:
    """Whether ``memory`` is what a block was fused with, or will be."""
    return getattr(module, "_resnet_fused_memory", MEMORY[0]) == memory


def _run(model: nn.Module, x: Tensor, mode: str) -> tuple[Row, ...]:
    ledger = Ledger(x)
    with blocks.watched(model, ledger), ledger, torch.set_grad_enabled(mode == "train"):
        out = model(x)
        if mode == "train":
            roots = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
            gradients = [torch.empty_like(root) for root in roots]
            ledger.follow(gradients)
            torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    return ledger.rows()


class Ledger(TorchDispatchMode):
    """Adds up every op that runs within it and depends on the tensors it follows, by block and phase."""

    def __init__(self, *followed: Tensor) -> None:
        super().__init__()
        self._found: dict[tuple[str, str, str], tuple[int, Traffic]] = {}
        self._stack: list[tuple[str, str]] = []
        self._last = ("", blocks.FORWARD)
        self._followed = WeakIdKeyDictionary()
        self.follow(followed)

    def follow(self, values: Any) -> None:
        """Count ops on these tensors, and on what comes of them."""
        for t in _tensors(values):
            self._followed[t] = True

    def enter(self, block: str, phase: str) -> None:
        self._stack.append((block, phase))

    def leave(self) -> None:
        self._last = self._stack.pop()

    def rows(self) -> tuple[Row, ...]:
        """What was found, in the order of first calls."""
        return tuple(Row(*key, calls, traffic) for key, (calls, traffic) in self._found.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            self.follow(out)
            for op, arguments in parts(func._opname, tuple(args)):
                self._add(op, of(op, arguments))
        elif any(t in self._followed for t in _tensors((args, kwargs))):
            self.follow(out)
            traffic = _aten_traffic(func, args, kwargs, out)
            if traffic != ZERO:
                self._add(func._opname, traffic)
        return out

    def _add(self, op: str, traffic: Traffic) -> None:
        # Between blocks autograd adds up the gradients of what the last one read.
        outside = self._last if _in_backward() else ("", blocks.FORWARD)
        block, phase = self._stack[-1] if self._stack else outside
        calls, before = self._found.get((block, phase, op), (0, ZERO))
        self._found[block, phase, op] = (calls + 1, before + traffic)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# --- PyTorch's own ops ------------------------------------------------------------------------------------------------


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(*values: Any) -> int:
    """Of each tensor once; of an expanded one what it repeats."""
    distinct = {id(t): t for t in _tensors(values)}
    return sum(_extent(t) * t.element_size() for t in distinct.values())


def _extent(t: Tensor) -> int:
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)


def _aten_traffic(func: Any, args: Any, kwargs: Any, out: Any) -> Traffic:
    """Bytes and FLOPs of one op of PyTorch's."""
    name = func._opname
    if func.is_view or name in _FREE or not _tensors(out):
        return ZERO
    names = [argument.name for argument in func._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    flops = flop_registry.get(func.overloadpacket)
    return Traffic(_ATEN.get(name, _once)(named, out), 0 if flops is None else int(flops(*args, **kwargs, out_val=out)))


_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}

Rule = Callable[[dict[str, Any], Any], int]


def _once(a: dict[str, Any], out: Any) -> int:
    return _bytes(list(a.values())) + _bytes(out)


def _without(*unread: str) -> Rule:
    """Operands that are given for their shape alone, or are written and not read."""
    return lambda a, out: _once({name: value for name, value in a.items() if name not in unread}, out)


def _convolution(a: dict[str, Any], out: Any) -> int:
    return _image_bytes(a) + _bytes(a["weight"], a["bias"]) + _bytes(out)


def _convolution_backward(a: dict[str, Any], out: Any) -> int:
    dx, dw, db = (given if wanted else None for given, wanted in zip(out, a["output_mask"], strict=True))
    gradient = _bytes(a["grad_output"])
    moved = 0 if dx is None else gradient + _bytes(a["weight"], dx)
    moved += 0 if dw is None else gradient + _image_bytes(a) + _bytes(dw)
    return moved + (0 if db is None else gradient + _bytes(db))


def _image_bytes(a: dict[str, Any]) -> int:
    """The pixels of a convolution's input that it reads (square geometry; all of them elsewhere)."""
    x, kernel = a["input"], a["weight"].shape[2:]
    stride, padding, dilation = a["stride"], a["padding"], a["dilation"]
    geometry = zip(x.shape[2:], kernel, stride, padding, dilation, strict=False)
    return math.prod(x.shape[:2]) * math.prod(reached(*axis) for axis in geometry) * x.element_size()


def _batch_norm(a: dict[str, Any], out: Any) -> int:
    batch_statistics = a.get("training", a.get("train", True))
    return _once(a, out) + (_bytes(a["input"]) if batch_statistics else 0)


def _batch_norm_backward(a: dict[str, Any], out: Any) -> int:
    gradient = a["grad_out"] if "grad_out" in a else a["grad_output"]
    batch_statistics = a.get("train", a.get("update", True))
    return _once(a, out) + (_bytes(gradient, a["input"]) if batch_statistics else 0)


_ATEN: dict[str, Rule] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "batch_norm_backward": _batch_norm_backward,
    "max_pool2d_with_indices_backward": _without("self"),
    "copy_": _without("self"),
    "fill_": _without("self"),
    "zero_": _without("self"),
}
"""Ops whose bytes are not those of every operand and result once."""
