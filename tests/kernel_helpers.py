"""How the Triton kernels are tested: on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from helpers import assert_close, is_channels_last
from test_ops import TOLERANCE, Maker, exact, flatten
from torch import Tensor

from resnet_fused import backends, tuning
from resnet_fused.ops._op import ops as registered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What kernels read; in the interpreter products decline bf16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def maker(dtype: torch.dtype, layout: str = "channels_last", seed: int = 100) -> Maker:
    """Random operands on :data:`DEVICE`."""
    return Maker(dtype, DEVICE, layout, seed)


@contextlib.contextmanager
def forced(op: str, config: tuning.Config | None = None) -> Iterator[None]:
    """Within it every op runs in Triton, and ``op`` with ``config`` if one is given."""
    with backends.use_backend("triton"), contextlib.nullcontext() if config is None else tuning.use(op, config):
        yield


def run(op: str, args: tuple, config: tuning.Config | None = None) -> tuple[Tensor, ...]:
    """The outputs of ``op`` in Triton."""
    with forced(op, config):
        return flatten(registered[op](*args))


def compare(
    op: str, args: tuple, config: tuning.Config | None = None, *, tolerance: float | None = None
) -> tuple[Tensor, ...]:
    """``op`` in Triton against the reference in fp64: values, dtypes, layouts, the same bits twice, arguments kept.

    ``tolerance`` is relative to the largest exact value of an output; it defaults to a few roundings of the dtype.
    """
    if tolerance is None:
        tolerance = TOLERANCE[next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    found, expected = run(op, args, config), exact(op, args)
    for i, (t, e, like) in enumerate(zip(found, expected, outputs(op, args), strict=True)):
        assert t.dtype == like.dtype, f"output {i}: {t.dtype} instead of {like.dtype}"
        assert_close(t, e, tolerance, f"output {i}")
        if t.dim() == 4 and is_channels_last(like):
            assert is_channels_last(t), f"output {i}"
    assert all(torch.equal(a, b) for a, b in zip(found, run(op, args, config), strict=True)), (
        "other bits at a second run"
    )
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor)), (
        "argument changed"
    )
    return found


def outputs(op: str, args: tuple) -> tuple[Tensor, ...]:
    """What ``op`` promises to return, as meta tensors."""
    meta = [torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a for a in args]
    return flatten(registered[op].overload(*meta))
