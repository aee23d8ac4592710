"""What of a model is fused, and which path each block takes for an input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from resnet_fused import backends
from resnet_fused.blocks import paths
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.blocks.structure import Structure, read
from resnet_fused.convert import FUSED, candidates, reason_to_decline


@dataclass(frozen=True)
class Row:
    """One block or stem of a model."""

    name: str
    kind: str  # basic, bottleneck, prelu, stem, norm
    status: str  # fused, declined
    reason: str | None = None  # code
    detail: str | None = None  # sentence
    backends: dict[str, str] = field(default_factory=dict)  # op -> backend, for the device of the block's parameters
    memory: str = "save"  # or projections, recompute: what a fused block keeps for backward


@dataclass(frozen=True)
class Report:
    """The blocks of a model; ``str()`` gives a table."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> list[Row]:
        return [row for row in self.rows if row.status == "fused"]

    @property
    def declined(self) -> list[Row]:
        return [row for row in self.rows if row.status == "declined"]

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        if not self.rows:
            return "no residual block of torchvision, timm or resnet_fused found"
        blocks = [row for row in self.rows if row.kind not in ("stem", "norm")]
        fused = sum(row.status == "fused" for row in blocks)
        stems = [row.status for row in self.rows if row.kind == "stem"]
        recomputing = sum(row.memory != "save" for row in blocks)
        told = f" ({recomputing} recompute in backward)" if recomputing else ""
        summary = f"{fused} of {len(blocks)} blocks fused{told}; stem: {', '.join(stems) or 'none found'}"
        ends = [row.status for row in self.rows if row.kind == "norm"]
        summary += f"; final norm: {', '.join(ends)}" if ends else ""
        used = [
            (row.name or "(model)", row.kind, row.status, _summary(row.backends), row.detail or "") for row in self.rows
        ]
        return f"{table(('name', 'kind', 'status', 'backends', 'detail'), used)}\n{summary}"


def _summary(chosen: dict[str, str]) -> str:
    return ", ".join(dict.fromkeys(chosen.values()))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Left-aligned columns with a rule below the header."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


_OPS = {
    "stem": ("bn_statistics", "stem_forward", "stem_infer", "stem_backward"),
    "block": ("bn_finalize", "bn_coefficients", "bn_add_relu_forward", "bn_add_relu_reduce"),
    "norm": ("bn_statistics", "bn_finalize", "bn_coefficients", "bn_add_relu_forward", "bn_add_relu_apply"),
    "conv": ("fprop", "infer", "bprop"),
}


def report(model: nn.Module) -> Report:
    """Every block and stem that could be fused, whether it is, and if not why.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected model to be an nn.Module, got {type(model).__name__}")
    rows = []
    for name, module in candidates(model):
        kind = getattr(module, "kind", None) or _kind(module)
        if not isinstance(module, FUSED):
            rows.append(Row(name, kind, "declined", "not-swapped", "not swapped: call resnet_fused.fuse"))
            continue
        reason = reason_to_decline(module)
        if reason is None:
            rows.append(Row(name, kind, "fused", None, None, _backends(module, kind), _memory(module)))
        else:
            rows.append(Row(name, kind, "declined", *reason))
    return Report(tuple(rows))


def _kind(module: nn.Module) -> str:
    from resnet_fused.adapters import fused_classes

    fused: Any = fused_classes()[type(module)]
    return fused.kind


def _memory(module: Any) -> str:
    """What a fused module keeps for backward: "save" where there is nothing to recompute."""
    structure = read(module) if isinstance(module, FusedResidual) else None
    if not isinstance(structure, Structure):
        return "save"
    mixing, memory = structure.unit.mixing, module._resnet_fused_memory
    if memory == "projections" and structure.projection is None:
        return "save"
    return "save" if mixing is not None and mixing.reads_branch else memory


def _backends(module: Any, kind: str) -> dict[str, str]:
    """For each op of the block: the backend that small operands of the block's dtype and device would get."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if kind in ("stem", "norm"):
        names = list(_OPS[kind])
    else:
        kernels = dict.fromkeys(conv.kernel_size[0] for conv, _ in module._chain())
        names = [f"conv{k}x{k}_{direction}" for k in kernels for direction in _OPS["conv"]] + list(_OPS["block"])
    forced = module._resnet_fused_backend
    forced = backends.forced() if forced == "auto" else forced
    return {name: backends.expected(name, device, forced) for name in names}


# --- explain --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One call of a block or stem."""

    name: str
    kind: str
    path: str  # train, infer, original
    reason: str | None
    detail: str | None


@dataclass(frozen=True)
class Explanation:
    """The path of every block for one input; ``str()`` gives a table."""

    steps: tuple[Step, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """The steps as plain dictionaries."""
        return [asdict(step) for step in self.steps]

    def __str__(self) -> str:
        if not self.steps:
            return "no fused block was called"
        rows = [(s.name or "(model)", s.kind, s.path, s.reason or "", s.detail or "") for s in self.steps]
        return table(("name", "kind", "path", "reason", "detail"), rows)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*args, **kwargs)`` once and tell which path each block took, and why.

    Buffers (running statistics) are copies meanwhile; the random state is put back. A compiled model is run without its
    compiled code, which takes the same paths.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected model to be an nn.Module, got {type(model).__name__}")
    names = {id(module): name for name, module in model.named_modules()}
    buffers = [(m, key, b) for m in model.modules() for key, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for *_, b in buffers}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        for module, key, buffer in buffers:
            module._buffers[key] = copies[id(buffer)]
        with torch.random.fork_rng(devices), eager, paths.recording() as calls:
            model(*args, **kwargs)
    finally:
        for module, key, buffer in buffers:
            module._buffers[key] = buffer
    steps = [
        Step(names.get(id(call.module), "?"), str(call.module.kind), call.path, *(call.reason or (None, None)))
        for call in calls
    ]
    return Explanation(tuple(steps))
