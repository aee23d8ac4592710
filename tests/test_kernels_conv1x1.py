"""The Triton kernels of ``conv1x1`` against the fp64 reference: forward, inference and dgrad in every form and walk."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CONVS, ConvCase
from helpers import LAYOUTS, assert_close, dtype_id, randn
from kernel_helpers import DEVICE, DTYPES, compare, maker, run
from test_ops import ABSENT, samples

from resnet_fused import backends, reference
from resnet_fused.kernels import conv1x1
from resnet_fused.kernels._product import Product, precision
from resnet_fused.tuning import ProductConfig

# Triton's interpreter multiplies bf16 wrongly, and the kernels decline it there.
PRODUCTS = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)
OPS = ("conv1x1_fprop", "conv1x1_infer", "conv1x1_dgrad")
# Each wrong in its own way if a kernel is.
SHAPES = (
    ConvCase(1, 3, 72, 13, 9, 136, 1, 1, 1, "every tile partial"),
    ConvCase(1, 3, 136, 9, 10, 80, 2, 1, 1, "stride 2 of an odd and an even size"),
    ConvCase(1, 2, 64, 16, 32, 64, 1, 1, 1, "whole tiles, one step, several for each program"),
    ConvCase(1, 1, 128, 16, 16, 64, 1, 1, 1, "whole tiles, two steps"),
    *(case for case in CONVS if case.kernel == 1),
)
WALKS = (
    ProductConfig(64, 16, 16, warps=4, stages=2),
    ProductConfig(128, 32, 32, warps=8, stages=3, programs=2),
    ProductConfig(64, 64, 32, warps=4, stages=2, descriptors=True),
    ProductConfig(128, 128, 64, warps=8, stages=3, descriptors=True),
)


def runnable(op, dtype, case, layout="channels_last"):
    """Arguments in every form that the kernel takes: only packed masks of odd channels are declined."""
    every = samples(op, maker(dtype, layout), case)
    found = [args for args in every if backends.unavailable(op, "triton", *args) is None]
    packed = [any(isinstance(a, torch.Tensor) and a.dtype == torch.uint8 for a in args) for args in every]
    odd = case.c % 8 or case.k % 8
    assert len(found) >= len(every) - (sum(packed) if odd else 0)
    return found


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
@pytest.mark.parametrize("op", OPS)
def test_every_form_on_every_shape(op, case):
    for args in runnable(op, torch.float16, case):
        compare(op, args)


@pytest.mark.parametrize("dtype", PRODUCTS[:1] + PRODUCTS[2:], ids=dtype_id)
@pytest.mark.parametrize("op", OPS)
def test_every_form_in_other_dtypes(op, dtype):
    for args in runnable(op, dtype, SHAPES[1]):
        compare(op, args)


@pytest.mark.parametrize("config", WALKS, ids=lambda c: f"{c.m}x{c.n}x{c.k}{'-descriptors' * c.descriptors}")
@pytest.mark.parametrize("op", OPS)
def test_every_walk_over_the_tiles(op, config):
    for args in runnable(op, torch.float16, SHAPES[0])[1::3]:
        compare(op, args, config)


def test_descriptors_of_every_tensor():
    """A plain product: the kernel has no other tensor."""
    case = SHAPES[3]
    x, w = maker(torch.float16).activation(case.n, case.c, case.h, case.w), maker(torch.float16).weight(case)
    compare("conv1x1_fprop", (x, *ABSENT, w, *case.geometry, False), WALKS[2])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_any_strides(op, layout):
    for args in runnable(op, torch.float32, SHAPES[4], layout):
        compare(op, args)


def test_statistics_are_exact_under_a_large_mean():
    """Mean 1e4 deviations from 0 in fp32, over many programs and tiles, the last one partial."""
    x = (randn(5, 16, 13, 11) + 1e4).float().to(DEVICE)
    weight = torch.eye(16, device=DEVICE).view(16, 16, 1, 1)
    for config in (None, ProductConfig(64, 16, 16, warps=4, stages=2)):
        y, counts, mean, m2 = run("conv1x1_fprop", (x, *ABSENT, weight, 1, 1, 1, True), config)
        exact = y.double()
        assert counts.tolist() == [5 * 13 * 11]
        assert_close(mean[0], exact.mean((0, 2, 3)), 1e-7)
        assert_close(m2[0] / counts, exact.var((0, 2, 3), correction=0), 1e-3)


def test_statistics_are_of_the_rounded_output():
    args = samples("conv1x1_fprop", maker(torch.float16), SHAPES[0])[1]
    y, counts, mean, m2 = run("conv1x1_fprop", args)
    exact = reference.bn_statistics(y.double())
    assert torch.equal(counts.cpu(), exact[0].cpu())
    assert_close(mean, exact[1], 1e-6)
    assert_close(m2, exact[2], 1e-6)


def test_statistics_of_one_row():
    args = (torch.randn(1, 8, 1, 1, device=DEVICE), *ABSENT, torch.randn(4, 8, 1, 1, device=DEVICE), 1, 1, 1, True)
    y, counts, mean, m2 = run("conv1x1_fprop", args)
    assert counts.tolist() == [1]
    assert_close(mean[0], y.flatten(), 1e-7)
    assert m2.tolist() == [[0.0] * 4]


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op):
    """A NaN in what a pixel reads makes that pixel NaN and no other, whatever ReLUs and masks it meets."""
    for args in runnable(op, torch.float32, SHAPES[2]._replace(h=9, w=9)):
        poisoned = args[0].clone()
        poisoned[1, 3, 2, 4] = math.nan
        args = (poisoned, *args[1:])
        found = run(op, args)[0]
        exact = reference.conv_dgrad(*args) if op.endswith("dgrad") else None
        exact = exact or (reference.conv_fprop(*args) if op.endswith("fprop") else (reference.conv_infer(*args),))
        assert torch.equal(found.isnan(), exact[0].isnan())


def test_gradient_of_zero_and_nan_inputs():
    """The mask of a deferred input is ``!(z <= 0)``: nothing passes at 0, everything at NaN."""
    weight = torch.ones(8, 8, 1, 1, device=DEVICE)
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 2.0], device=DEVICE).view(1, 8, 1, 1)
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    dz = torch.ones(1, 8, 1, 1, device=DEVICE)
    args = (dz, *[None] * 5, weight, x, one, zero, None, None, None, None, None, 1.0, 1, 1, 1)
    assert run("conv1x1_dgrad", args)[0].flatten().tolist() == [0, 0, 8, 0, 8, 8, 0, 8]


def test_full_precision_unless_torch_allows_tf32():
    assert precision(torch.float32) == "tf32x3"
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert precision(torch.float32) == "tf32"
    finally:
        torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize(("asked", "taken"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_precision_of_convolutions_alone(asked, taken):
    """PyTorch's newer flag, beside which the older one cannot be read."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = asked
    try:
        assert precision(torch.float32) == taken
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# --- what is declined -------------------------------------------------------------------------------------------------


def reason(op, *args):
    return backends.unavailable(op, "triton", *args)


def test_reasons():
    def fprop(dtype=torch.float32, stride=1, n=1):
        x, w = torch.zeros(n, 8, 4, 4, dtype=dtype, device=DEVICE), torch.zeros(8, 8, 1, 1, dtype=dtype, device=DEVICE)
        return (x, *ABSENT, w, stride, 1, 1, True)

    assert reason("conv1x1_fprop", *fprop()) is None
    assert reason("conv1x1_fprop", *fprop(n=0)) == "a tensor is empty"
    assert reason("conv1x1_fprop", *fprop(stride=3)) == "the kernel is written for strides 1 and 2, not 3"
    wide = reason("conv1x1_fprop", *fprop(torch.float64))
    assert wide == "the kernel is written for float32, float16 and bfloat16, not torch.float64"
    if DEVICE == "cpu":
        assert reason("conv1x1_fprop", *fprop(torch.bfloat16)) == "Triton's interpreter multiplies bfloat16 wrongly"
    odd = next(a for a in samples("conv1x1_dgrad", maker(torch.float32), SHAPES[4]) if a[1] is not None)
    packed = (odd[0], reference.pack_mask(odd[0] > 0), *odd[2:])
    assert reason("conv1x1_dgrad", *packed) == "packed masks are read for channels in multiples of 8, not 3"


def test_candidates_fit_their_problem():
    """A tile is never wider than the padded problem, whatever a candidate says."""
    x, w = torch.empty(2, 24, 8, 8, device="meta"), torch.empty(40, 24, 1, 1, device="meta")
    found = conv1x1.problem("conv1x1_fprop", x, *ABSENT, w, 1, 1, 1, True)
    assert found == Product(128, 40, 24, 1, "fp32", "plain", "statistics")
    assert len(set(conv1x1.candidates(found))) == len(conv1x1.candidates(found)) > 2
