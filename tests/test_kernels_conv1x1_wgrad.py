"""The weight's gradient of a 1x1 convolution in Triton, alone and together with the input's gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVS, ConvCase
from helpers import assert_close, dtype_id
from kernel_helpers import DEVICE, DTYPES, maker
from test_ops import TOLERANCE, exact, flatten, samples
from torch import Tensor

from resnet_fused import config, tuning
from resnet_fused.kernels import _launch

pytest.importorskip("triton")

from resnet_fused.kernels import conv1x1
from resnet_fused.kernels import conv1x1_bprop as bprop
from resnet_fused.kernels import conv1x1_wgrad as wgrad
from resnet_fused.reference import pack_mask
from resnet_fused.tuning import ProductConfig

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not config.triton_interprets(), reason="needs a CUDA GPU or Triton's interpreter"
)

WGRAD, BPROP = "conv1x1_wgrad", "conv1x1_bprop"
FUNCTIONS: dict[str, Callable[..., Any]] = {WGRAD: conv1x1.conv1x1_wgrad, BPROP: conv1x1.conv1x1_bprop}
PRODUCTS = [
    pytest.param(dtype, id=dtype_id(dtype))
    for dtype in DTYPES
    if dtype != torch.bfloat16 or not config.triton_interprets()
]


def check(op: str, args: tuple, config: ProductConfig | None = None, expected: tuple[Tensor, ...] | None = None):
    """A kernel against the reference in fp64; the same bits twice, arguments left alone."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    with contextlib.nullcontext() if config is None else tuning.use(op, config):
        found, again = (flatten(FUNCTIONS[op](*args)) for _ in range(2))
    for i, (t, e) in enumerate(zip(found, exact(op, args) if expected is None else expected, strict=True)):
        assert_close(t, e, TOLERANCE[args[7].dtype], f"output {i}")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))
    return found


def runnable(op: str, args: tuple) -> bool:
    """Whether packed masks have whole bytes in each row."""
    signs = [(args[1], args[6].shape[0])] + ([(args[14], args[6].shape[1])] if op == BPROP else [])
    return all(sign is None or sign.dtype != torch.uint8 or channels % 8 == 0 for sign, channels in signs)


#          R  N   C  H   W   K  s  d  g
SHAPES = (
    (
        ConvCase(1, 3, 24, 7, 9, 40, 1, 1, 1, "partial tiles of everything, several splits"),
        ProductConfig(64, 16, 16, 4, 3, 2),
    ),
    (ConvCase(1, 2, 32, 8, 8, 64, 1, 1, 1, "whole tiles, several programs"), ProductConfig(64, 32, 32, 4, 3)),
    (ConvCase(1, 1, 8, 5, 5, 8, 1, 1, 1, "one short tile"), ProductConfig(64, 64, 32, 4, 3, 3)),
    (ConvCase(1, 1, 20, 1, 1, 24, 1, 1, 1, "one row"), None),
)
cases = pytest.mark.parametrize(("case", "chosen"), SHAPES, ids=[case.id for case, _ in SHAPES])


@cases
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_weight_gradient(case, chosen, dtype):
    given = [args for args in samples(WGRAD, maker(dtype), case) if runnable(WGRAD, args)]
    assert any(args[1] is not None and args[1].dtype == torch.uint8 for args in given)
    for args in given[::2] if config.triton_interprets() else given:
        check(WGRAD, args, chosen)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_strided(dtype, stride):
    case = ConvCase(1, 2, 24, 7, 9, 16, stride, 1, 1, "")
    for args in samples(WGRAD, maker(dtype), case)[3:6]:
        check(WGRAD, args, ProductConfig(16, 16, 16, 4, 3))


@cases
@pytest.mark.parametrize("dtype", [p for p in PRODUCTS if p.values[0] != torch.float32])
def test_both_gradients(case, chosen, dtype):
    given = [args for args in samples(BPROP, maker(dtype), case) if runnable(BPROP, args)]
    for args in given[::2] if config.triton_interprets() else given:
        assert bprop.narrow(bprop.problem(*args))
        check(BPROP, args, None if chosen is None else ProductConfig(64, 32, chosen.k, 4, 3))


def test_sums_of_many_channels():
    """From 128 channels on a thread adds the rows that it holds."""
    case = ConvCase(1, 1, 160, 5, 13, 16, 1, 1, 1, "")
    for args in samples(BPROP, maker(torch.float16), case)[6:8]:
        check(BPROP, args, ProductConfig(16, 256, 32, 8, 3))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_any_strides(op, layout):
    for args in samples(op, maker(torch.float16, layout), SHAPES[2][0])[4:6]:
        check(op, args)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_offsets_of_64_bits(op, monkeypatch):
    for module in (wgrad, bprop):
        monkeypatch.setattr(module, "is_wide", lambda *tensors: True)
    check(op, samples(op, maker(torch.float16), SHAPES[1][0])[2], SHAPES[1][1])


@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradients_in_another_dtype(op):
    """dy is rounded to the weight's dtype whatever the dtypes of dz, y and the sign."""
    dz, sign, y, *rest = samples(op, maker(torch.float16), SHAPES[2][0])[2]
    check(op, (dz.float(), sign, y.float(), *rest))
    dz, sign, y, *rest = samples(op, maker(torch.float16), SHAPES[2][0])[1]
    check(op, (dz, sign.float(), y, *rest))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("channels", [32, 40], ids=["words", "bytes"])
def test_a_gradient_that_the_relu_stopped_is_not_read(op, channels):
    """Also where it is not finite; NaN that passes reaches its row of the weight's gradient and no other."""
    case = ConvCase(1, 1, 16, 6, 6, channels, 1, 1, 1, "")
    args = list(samples(op, maker(torch.float16), case)[2])
    passed = torch.rand(args[0].shape, device=DEVICE) > 0.5
    passed[:, 1, 0, 0], passed[:, 2, 0, 0] = False, True
    args[1] = pack_mask(passed)
    expected = exact(op, tuple(args))
    args[0] = args[0].clone()
    args[0][:, 1, 0, 0] = float("inf")
    check(op, tuple(args), expected=expected)
    args[0][:, 2, 0, 0] = float("nan")
    rows = flatten(FUNCTIONS[op](*args))[-1].flatten(1).isnan()
    assert rows[2].all()
    assert not rows[torch.arange(channels, device=DEVICE) != 2].any()


def test_a_mask_that_begins_within_a_word():
    args = list(samples(WGRAD, maker(torch.float16), SHAPES[1][0])[2])
    args[1] = torch.cat((args[1][:1], args[1]))[1:]
    check(WGRAD, tuple(args))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
def test_result_has_the_weights_format_and_the_dtype_asked_for(memory_format, dtype):
    args = list(samples(WGRAD, maker(torch.float16), SHAPES[2][0])[0])
    args[6], args[-1] = args[6].contiguous(memory_format=memory_format), dtype
    dw = conv1x1.conv1x1_wgrad(*args)
    assert dw.dtype == dtype
    assert dw.is_contiguous(memory_format=memory_format)
    assert dw.stride() == torch.empty_like(args[6]).stride()


@pytest.mark.parametrize("size", [1, 100, 2**16 + 5])
def test_partial_results_are_summed(size):
    part = torch.randn(19, size, device=DEVICE)
    out = torch.empty(size, dtype=torch.float16, device=DEVICE)
    wgrad.merge(part, out)
    assert_close(out, part.double().sum(0), TOLERANCE[torch.float16])


def test_what_is_declined():
    args = list(samples(WGRAD, maker(torch.float32), CONVS[0])[2])
    reason = conv1x1.UNSUPPORTED[WGRAD](*args)
    assert reason == "packed masks are read for channels in multiples of 8, not 3"
    args[1] = None
    assert conv1x1.UNSUPPORTED[WGRAD](*args) is None


def shape(k: int, c: int, stride: int = 1, dtype: str = "bf16") -> wgrad.Problem:
    return wgrad.Problem(50176, k, c, stride, dtype, True, "bits", True, False)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("k", "c"), [(3, 5), (64, 64), (256, 64), (64, 256), (128, 512), (1024, 256), (512, 2048), (2048, 1024), (72, 200)]
)
def test_candidates(k, c, dtype):
    """A few, each once; one of them fits into the shared memory of every GPU."""
    found = wgrad.candidates(shape(k, c, dtype=dtype))
    assert 1 <= len(found) == len(set(found)) <= 8
    assert min(candidate.shared for candidate in found) <= 99
    assert all(candidate.shared <= 227 for candidate in found)


def test_narrow():
    def problem(k: int, c: int, stride: int = 1, dtype: str = "bf16") -> bprop.Problem:
        return bprop.Problem(100, k, c, stride, dtype, True, "bits", "none", True, False, True)

    assert all(bprop.narrow(problem(k, c)) for k, c in ((64, 64), (256, 64), (64, 256), (3, 5), (128, 128)))
    assert not any(bprop.narrow(problem(k, c)) for k, c in ((128, 256), (16, 512), (512, 16)))
    assert not bprop.narrow(problem(64, 64, 2))
    assert not bprop.narrow(problem(64, 64, dtype="fp32"))
    for k, c in ((64, 64), (256, 64), (64, 256)):
        found = bprop.candidates(problem(k, c))
        assert len(found) == len(set(found)) <= 8
        assert all(candidate.shared <= 227 for candidate in found)


def test_one_launch_where_no_split_is_needed():
    args = samples(WGRAD, maker(torch.float16), ConvCase(1, 1, 16, 2, 2, 16, 1, 1, 1, ""))[0]
    with _launch.recording() as launches:
        conv1x1.conv1x1_wgrad(*args)
    assert [launch.kernel for launch in launches] == [wgrad.wgrad_kernel]
