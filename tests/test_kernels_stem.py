"""The Triton kernels of ``stem``: shapes at their edges, PyTorch's choice among equal values and NaNs, launches."""

from __future__ import annotations

import pytest
import torch
from helpers import EPS, assert_close, dtype_id
from kernel_helpers import DEVICE, DTYPES, compare, maker, run
from test_ops import flatten
from torch import Tensor

pytest.importorskip("triton")

from resnet_fused import backends, reference
from resnet_fused.kernels import stem
from resnet_fused.kernels._launch import recording
from resnet_fused.tuning import RowsConfig

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

# Small tiles: several blocks of channels, and in the interpreter 3 programs that walk over several tiles.
SMALL = RowsConfig(rows=4, channels=16, warps=1, programs=1)
CASES = [
    ((1, 1, 1, 1), None),
    ((2, 3, 5, 7), None),  # odd, channels that fill no vector
    ((2, 3, 5, 7), SMALL),
    ((1, 8, 1, 6), SMALL),  # rows that are windows' only ones
    ((2, 8, 6, 1), SMALL),
    ((1, 16, 35, 2), SMALL),  # several strips, the last one partial
    ((1, 24, 18, 5), SMALL),  # two blocks of channels, the second partial; two tiles for each program
]
every_case = pytest.mark.parametrize(
    ("shape", "config"), CASES, ids=[f"{shape}-{'small' if config else 'default'}" for shape, config in CASES]
)
# The interpreter cuts off where it should round to bf16, so only a GPU tells which values are equal then.
every_rounded_dtype = pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if DEVICE == "cuda" or dtype != torch.bfloat16], ids=dtype_id
)


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], -(-shape[2] // 2), -(-shape[3] // 2))


def backward_args(m, shape: tuple[int, ...]) -> tuple:
    """``dout, y, scale, shift, mean, rstd``."""
    c = shape[1]
    return m.activation(*pooled(shape)), m.activation(*shape), *m.norm(c), *m.norm(c)


@every_dtype
@every_case
def test_forward(shape, config, dtype):
    m = maker(dtype)
    compare("stem_forward", (m.activation(*shape), *m.norm(shape[1])), config)


def compare_in_its_dtype(op: str, args: tuple, config: RowsConfig | None) -> None:
    """Against the reference on the same 16-bit operands: which values are equal depends on their rounding."""
    for t, e in zip(run(op, args, config), flatten(getattr(reference, op)(*args)), strict=True):
        assert t.dtype == e.dtype
        assert_close(t, e, EPS[e.dtype] if e.dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@every_case
def test_backward(shape, config, dtype):
    m, c = maker(dtype), shape[1]
    args = backward_args(m, shape)
    count = torch.tensor([3, 0, 4], dtype=torch.int32, device=DEVICE)
    check = compare if dtype == torch.float32 else compare_in_its_dtype
    check("stem_reduce", args, config)
    check("stem_apply", (*args[:4], m.vector(c), m.vector(c), m.vector(c)), config)
    check("stem_backward", (*args, m.vector(c), count), config)
    check("stem_backward", (*args, m.vector(c), None), config)


# --- which of equal values wins -------------------------------------------------------------------------------------


def grid(*shape: int, step: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Few values, all multiples of ``step``: products and sums with others of the kind are exact."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, shape, generator=generator) * step
    t = values.to(DEVICE, dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def equal(found: Tensor, expected: Tensor) -> bool:
    """NaN where NaN is, else the same values."""
    return bool(torch.equal(found.isnan(), expected.isnan())) and bool(
        torch.equal(found.nan_to_num(), expected.nan_to_num())
    )


def exact_args(shape: tuple[int, ...], dtype: torch.dtype, shift: float) -> tuple[Tensor, ...]:
    """``dout, y, scale, shift`` for which no rounding but that of the normalised values happens."""
    c = shape[1]
    y = grid(*shape, step=1 / 64, dtype=dtype, seed=1)
    dout = grid(*pooled(shape), step=1 / 4, dtype=dtype, seed=2)
    scale = torch.tensor([1.0, -2.0, 0.5, 0.0], device=DEVICE).repeat(c)[:c]
    return dout, y, scale, torch.full((c,), shift, device=DEVICE)


@every_rounded_dtype
@pytest.mark.parametrize("shift", [0.0, 64.0, -1.0], ids=["some_pass", "ties_of_rounding", "none_pass"])
def test_the_first_of_equal_values_wins(shift, dtype):
    """At 64 the values of y lie closer than 16 bits tell apart."""
    shape = (1, 4, 19, 7)
    dout, y, scale, shift = exact_args(shape, dtype, shift)
    (out,) = run("stem_forward", (y, scale, shift), SMALL)
    assert torch.equal(out, reference.stem_forward(y, scale, shift))
    a, b, c = (grid(shape[1], step=1 / 4, dtype=torch.float32, seed=seed) for seed in (3, 4, 5))
    for coefficients in ((a, None, None), (a, b, c)):
        (dy,) = run("stem_apply", (dout, y, scale, shift, *coefficients), SMALL)
        assert torch.equal(dy, reference.stem_apply(dout, y, scale, shift, *coefficients))
    mean = torch.zeros(shape[1], device=DEVICE)
    sums = run("stem_reduce", (dout, y, scale, shift, mean, mean + 2), SMALL)
    for found, expected in zip(sums, reference.stem_reduce(dout, y, scale, shift, mean, mean + 2), strict=True):
        assert torch.equal(found, expected)


@every_dtype
def test_nan_wins_and_of_several_the_last(dtype):
    shape = (1, 4, 21, 5)
    dout, y, scale, shift = exact_args(shape, dtype, 0.0)
    scale = scale + 0.25
    for every in (50, 7, 2):
        y[torch.arange(y.numel(), device=DEVICE).view(shape) % every == 0] = float("nan")
        y[:, :, -1, -1] = float("inf")
        (out,) = run("stem_forward", (y, scale, shift), SMALL)
        assert equal(out, reference.stem_forward(y, scale, shift))
        (dy,) = run("stem_apply", (dout, y, scale, shift, scale, None, None), SMALL)
        assert equal(dy, reference.stem_apply(dout, y, scale, shift, scale, None, None))


# --- launches -------------------------------------------------------------------------------------------------------


def test_launches():
    """One each, the backward in two: coefficients come with the sums."""
    m = maker(torch.float16)
    args = backward_args(m, (2, 8, 6, 6))
    count = torch.tensor([72], dtype=torch.int32, device=DEVICE)
    calls = {
        "stem_forward": (args[1:4], 1),
        "stem_reduce": (args, 1),
        "stem_apply": ((*args[:4], m.vector(8), None, None), 2),
        "stem_backward": ((*args, m.vector(8), count), 2),
    }
    for op, (given, launches) in calls.items():
        with recording() as found:
            getattr(stem, op)(*given)
        assert len(found) == launches, op


@every_dtype
@pytest.mark.parametrize("channels", [1, 3, 64, 100, 2048])
def test_candidates_fit_their_problem(channels, dtype):
    y = torch.empty(2, channels, 9, 9, dtype=dtype, device="meta")
    dout = torch.empty(2, channels, 5, 5, dtype=dtype, device="meta")
    for op, args in (("stem_forward", (y,)), ("stem_reduce", (dout, y))):
        found = stem.candidates(stem.problem(op, *args))
        assert len(set(found)) == len(found)
        assert all(c.rows * c.channels >= 32 * c.warps and c.programs >= 1 for c in found)


def test_declined():
    y, v = torch.ones(1, 2, 4, 4, dtype=torch.float64, device=DEVICE), torch.ones(2, device=DEVICE).double()
    assert "not torch.float64" in str(backends.unavailable("stem_forward", "triton", y, v, v))
    y = y.float()[:0]
    assert backends.unavailable("stem_forward", "triton", y, v.float(), v.float()) == "a tensor is empty"
    huge, v = torch.empty(1, 2**21, 32, 32, dtype=torch.float16, device="meta"), torch.empty(2**21, device="meta")
    assert stem.UNSUPPORTED["stem_forward"](huge, v, v) == "an image has 2^31 elements or more"
