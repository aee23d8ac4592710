"""Errors of the fused and of the eager model against fp64, tensor by tensor.

**Error.** ``norm(value - truth) / norm(truth)`` over a whole tensor, in fp64. The truth is the eager model in fp64
with the same (already rounded) parameters and input. A tensor that exact arithmetic makes zero, such as the gradient
of a bias in front of a batch norm, has no relative error: its difference is measured against the typical size of the
model's gradients.

**Bound.** The fused error is at most ``2 * eager + floor``. Eager is PyTorch's own error in the same dtype, the
larger one of its two memory formats (at most ten times the lesser): its kernels differ between NCHW and
channels_last, and both are PyTorch. The floor is about eight roundings in fp32 (1e-6) and one in fp16 and bf16 (1e-3,
8e-3): below that, a ratio of errors is one of chance.

**Draws.** The gradient of a ReLU jumps at 0. A value within rounding error of 0 can fall on either side, in one run
and not in the other, and that one element then outweighs all rounding: a relative error of 1e-3 where its neighbours
have 1e-6. That is chance, in the eager model as in the fused one; a fault is there for every input. So a tensor
beyond its bound is tried again with other images, up to ``draws`` times, and fails if it is beyond the bound every
time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import resnet_fused

FACTOR = 2.0
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = ("output", "input gradient", "gradient", "buffer")
_APART = (
    10.0  # the memory formats' errors differ by more only if a ReLU input fell on either side of 0: then the lesser
)
_ZERO = 1e-9  # of the gradients' typical size: a tensor whose truth is smaller is zero in exact arithmetic


@dataclass
class Row:
    """One tensor in one mode; errors are relative to fp64."""

    mode: str  # train, eval
    kind: str  # of KINDS
    name: str
    truth: float  # root mean square of the fp64 value
    eager_nchw: float
    eager_channels_last: float
    fused: float
    floor: float
    draws: int = 1  # how many were tried; the errors are of the last of them
    failed: bool = False  # beyond the bound in each of them

    @property
    def eager(self) -> float:
        return min(
            max(self.eager_nchw, self.eager_channels_last), _APART * min(self.eager_nchw, self.eager_channels_last)
        )

    @property
    def ratio(self) -> float:
        """fused / eager; 1 where both are exact."""
        return self.fused / self.eager if self.eager > 0 else (1.0 if self.fused == 0 else float("inf"))

    @property
    def share(self) -> float:
        """Which part of the bound the fused error takes; more than 1 is beyond it (NaN counts as beyond)."""
        share = self.fused / (FACTOR * self.eager + self.floor)
        return share if share == share else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the derived ones."""
        return {**asdict(self), "eager": self.eager, "ratio": self.ratio, "share_of_bound": self.share}


Values = dict[tuple[str, str], Tensor]  # (kind, name) -> value


def evaluate(model: nn.Module, x: Tensor, mode: str, seed: int) -> Values:
    """Forward and backward of ``model`` on ``x``: outputs, gradients and buffers.

    In eval mode the outputs are taken twice: without gradient, where the fused blocks fold their norms, and with.
    """
    model.train(mode == "train")
    found: Values = {}
    if mode == "eval":
        torch.manual_seed(seed)
        with torch.no_grad():
            found.update(_leaves("output", "without gradient", model(x)))
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    outputs = _leaves("output", "with gradient", out)
    found.update(outputs)
    _loss(list(outputs.values()), seed).backward()
    if x.grad is not None:
        found["input gradient", "images"] = x.grad
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found["gradient", name] = parameter.grad
    if mode == "train":
        for name, buffer in model.named_buffers():
            found["buffer", name] = buffer
    return {key: value.detach().cpu() for key, value in found.items()}


def _leaves(kind: str, name: str, out: Any) -> Values:
    """The floating tensors of any nest of tuples and dictionaries, by path."""
    return {
        (kind, f"{name} {pytree.keystr(path)}".strip()): leaf
        for path, leaf in pytree.tree_flatten_with_path(out)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _loss(outputs: list[Tensor], seed: int) -> Tensor:
    """Cross-entropy with seeded labels for logits, a seeded linear form of any other output; in fp64."""
    generator = torch.Generator().manual_seed(seed + 3)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        wide = out.double()
        if out.dim() == 2 and out.shape[1] > 1:
            labels = torch.randint(out.shape[1], (out.shape[0],), generator=generator)
            total = total + F.cross_entropy(wide, labels.to(out.device))
        else:
            total = total + (wide * torch.randn(out.shape, generator=generator).to(wide)).mean()
    return total


def rows(truth: Values, nchw: Values, channels_last: Values, fused: Values, mode: str, floor: float) -> list[Row]:
    """One row for each tensor of the truth; a tensor that a run lacks has an infinite error."""
    sizes = [_rms(value) for (kind, _), value in truth.items() if kind == "gradient"]
    typical = torch.tensor(sizes).median().item() if sizes else 1.0

    def error(values: Values, key: tuple[str, str]) -> float:
        value, exact = values.get(key), truth[key]
        if value is None or value.shape != exact.shape:
            return float("inf")
        if not exact.is_floating_point():
            return 0.0 if torch.equal(value, exact) else float("inf")
        size = _rms(exact)
        if "gradient" in key[0] and size < _ZERO * typical:
            size = typical
        difference = _rms(value.double() - exact)
        return difference / size if size > 0 else difference

    found = [
        Row(mode, *key, _rms(truth[key]), error(nchw, key), error(channels_last, key), error(fused, key), floor)
        for key in truth
    ]
    extra = [key for key in fused if key not in truth]
    return found + [Row(mode, *key, 0.0, 0.0, 0.0, float("inf"), floor) for key in extra]


def _rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item() if value.numel() else 0.0


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, which would make every fp32 error one of 1e-3."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


def compare(
    model: nn.Module,
    images: Callable[[int], Tensor],
    *,
    modes: tuple[str, ...],
    dtype: torch.dtype,
    seed: int = 0,
    draws: int = 5,
    backend: str = "auto",
    memory: str = "save",
    advance: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Errors of ``fuse(copy of model)`` and of ``model`` itself, both in ``dtype``, against ``model`` in fp64.

    Args:
        model: an eager model; not changed.
        images: draw -> (N, C, H, W) fp32, on the device of the model.
        modes: of "train" and "eval".
        draws: how often a tensor beyond its bound is tried.
        advance: told before every run what it is; called 4 times a mode for each draw.
    Returns:
        One row for each tensor, of the draw that decided: the first one in which it was within its bound, or the last.
    """
    rounded = copy.deepcopy(model).to(dtype)

    def one(mode: str, draw: int) -> list[Row]:
        x = images(draw).to(dtype)
        where = mode if draw == 0 else f"{mode}, draw {draw + 1}"
        last = torch.channels_last
        with full_precision():
            advance(f"{where}: eager {_short(dtype)}, NCHW")
            nchw = evaluate(copy.deepcopy(rounded), x, mode, seed + draw)
            advance(f"{where}: eager {_short(dtype)}, channels_last")
            format_ = x.contiguous(memory_format=last)
            channels_last = evaluate(copy.deepcopy(rounded).to(memory_format=last), format_, mode, seed + draw)
            advance(f"{where}: fused {_short(dtype)}")
            twin = resnet_fused.fuse(copy.deepcopy(rounded), backend=backend, memory=memory)
            fused = evaluate(twin, x, mode, seed + draw)
            advance(f"{where}: eager fp64")
            truth = evaluate(copy.deepcopy(rounded).double(), x.double(), mode, seed + draw)
        return rows(truth, nchw, channels_last, fused, mode, FLOORS[dtype])

    found: list[Row] = []
    for mode in modes:
        current = {(row.kind, row.name): row for row in one(mode, 0)}
        for draw in range(1, draws):
            beyond = [key for key, row in current.items() if not row.share <= 1]
            if not beyond:
                break
            again = {(row.kind, row.name): row for row in one(mode, draw)}
            for key in beyond:
                current[key] = again.get(key, current[key])
                current[key].draws = draw + 1
        for row in current.values():
            row.failed = not row.share <= 1
        found += current.values()
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


@dataclass(frozen=True)
class Summary:
    """The tensors of one kind in one mode."""

    mode: str
    kind: str
    count: int
    eager_nchw: float  # median error
    eager_channels_last: float
    fused: float
    ratio: float  # median of fused / eager
    fused_worst: float  # greatest error
    eager_worst: float
    share: float  # greatest part of a bound that a fused error takes


def summaries(found: list[Row]) -> list[Summary]:
    """One summary for each mode and kind that occurs."""
    result = []
    for mode in dict.fromkeys(row.mode for row in found):
        for kind in KINDS:
            some = [
                row
                for row in found
                if row.mode == mode and row.kind == kind and row.name.rpartition(".")[2] != _COUNTER
            ]
            if some:
                medians = [_median([getattr(row, name) for row in some]) for name in _MEDIANS]
                worst = [max(getattr(row, name) for row in some) for name in ("fused", "eager", "share")]
                result.append(Summary(mode, kind, len(some), *medians, *worst))
    return result


_COUNTER = "num_batches_tracked"  # exact or wrong: it has no place in a median
_MEDIANS = ("eager_nchw", "eager_channels_last", "fused", "ratio")


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).median().item()
