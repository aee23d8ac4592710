"""Which ops a model calls, with which arguments: found without a GPU and without computing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import resnet_fused
from resnet_fused import traffic
from resnet_fused.kernels._launch import recording
from resnet_fused.ops import bn_add_relu
from resnet_fused.ops._op import observed


class Call(NamedTuple):
    """One call of an op. Tensors are on the meta device: shapes, strides and dtypes alone."""

    op: str
    args: tuple[Any, ...]


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return tuple(value) if isinstance(value, list) else value


def of_model(
    build: Callable[[], nn.Module], *, batch: int, size: int, dtype: torch.dtype, train: bool, channels: int = 3
) -> list[Call]:
    """The calls of one training step (forward, loss, backward), or of one inference, of ``fuse(build())``.

    A training step in 16 bits runs under autocast, inference has parameters of ``dtype``: as users run them.

    Args:
        build: gives a model of images.
        batch, channels, size: of the input (N, C, H, W), H = W = ``size``.
    """
    found: list[Call] = []

    def note(op: str, args: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
        found.append(Call(op, args))
        return contextlib.nullcontext()

    kept = torch.float32 if train else dtype
    model = resnet_fused.fuse(build().to("cpu", kept).train(train))
    # Fake tensors on the CPU, which a machine without a GPU can take through autograd, and the masks of a GPU.
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(bn_add_relu, "_packs", return_value=True):
        x = torch.empty(batch, channels, size, size, dtype=kept)
        with observed(note):
            if train:
                with _autocast(dtype):
                    out = model(x)
                F.cross_entropy(out.float(), torch.empty(batch, dtype=torch.int64)).backward()
            else:
                with torch.no_grad():
                    model(x)
    return unique(Call(op, tuple(_meta(a) for a in args)) for op, args in found)


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        yield


def unique(calls: Iterable[Call]) -> list[Call]:
    """The first of equal calls."""
    found: dict[Any, Call] = {}
    for call in calls:
        known = ((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in call.args)
        found.setdefault((call.op, *known), call)
    return list(found.values())


def parts(call: Call) -> list[Call]:
    """The calls that a convolution stands for: dgrad and wgrad of ``bprop``, the passes of the materialised form."""
    if not call.op.startswith("conv"):
        return []
    return [*(Call(*part) for part in traffic.parts(*call) if part[0] != call.op), *_passes(call)]


def _passes(call: Call) -> list[Call]:
    from resnet_fused.kernels import materialised  # brings Triton

    found: list[Call] = []

    def spy(op: str) -> Callable[..., Any]:
        run = getattr(materialised, op)

        def noted(*args: Any) -> Any:
            found.append(Call(op, tuple(_meta(a) for a in args)))
            return run(*args)

        return noted

    spies: dict[str, Any] = {name: spy(name) for name in dir(materialised) if name.startswith("bn_")}
    with recording(), mock.patch.multiple(materialised, **spies):
        getattr(materialised, call.op.rpartition("_")[2])(*call.args)
    return found
