"""The materialised convolutions of the Triton backend: any kernel size, every form of the operands, few passes."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ConvCase
from helpers import dtype_id
from kernel_helpers import DTYPES, compare, maker, run
from test_ops import DIRECTIONS, samples
from torch import Tensor

from resnet_fused import backends
from resnet_fused.kernels import materialised, module_of
from resnet_fused.kernels._launch import recording

# Channels in multiples of 8, so that the packed masks among the samples are read, too.
CASES = (
    #        R  N  C   H   W   K   s  d  g
    ConvCase(3, 2, 8, 13, 11, 16, 1, 1, 1, "several tiles, the last one partial"),
    ConvCase(3, 3, 16, 7, 6, 8, 2, 1, 1, "stride 2, odd and even"),
    ConvCase(3, 1, 8, 6, 5, 24, 2, 2, 4, "dilation and groups, channels between powers of 2"),
    ConvCase(3, 1, 8, 1, 1, 8, 1, 1, 1, "one pixel"),
)


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """cuDNN's convolutions give the same bits at every run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def supported(name: str, m, case: ConvCase) -> list[tuple]:
    found = [args for args in samples(name, m, case) if backends.unavailable(name, "triton", *args) is None]
    assert len(found) == len(samples(name, m, case))
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_form(case, direction):
    for args in supported(f"conv3x3_{direction}", maker(torch.float16), case):
        compare(f"conv3x3_{direction}", args)


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_dtype_in_other_layouts(dtype, direction, layout):
    forms = supported(f"conv3x3_{direction}", maker(dtype, layout), CASES[1])
    for args in forms[:: max(1, len(forms) // 3)]:
        compare(f"conv3x3_{direction}", args)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_functions_do_other_kernel_sizes(direction):
    """What conv1x1 offers as a candidate."""
    case = CASES[1]._replace(kernel=1)
    for args in samples(f"conv1x1_{direction}", maker(torch.float32), case):
        found = getattr(materialised, direction)(*args)
        expected = backends.implementations(f"conv1x1_{direction}")["reference"].run(*args)
        pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nan_reaches_what_it_reaches_in_the_reference():
    for args in supported("conv3x3_bprop", maker(torch.float32), CASES[0]):
        dz = args[0].clone()
        dz[0, 0, 0, 0] = math.nan
        expected = backends.implementations("conv3x3_bprop")["reference"].run(dz, *args[1:])
        for t, e in zip(run("conv3x3_bprop", (dz, *args[1:])), expected, strict=True):
            assert torch.equal(t.isnan(), e.isnan())


def passes(name: str, args: tuple) -> list[str]:
    """The kernels that are launched, in order."""
    meta = [torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a for a in args]
    with recording() as launches:
        getattr(module_of(name), name)(*meta)
    return [launch.kernel.fn.__name__ for launch in launches]


def test_nothing_is_written_that_need_not_be():
    """One pass for each operand that has something pending, one for what comes after; none for plain operands."""
    m = maker(torch.float16)
    fprop, infer = (samples(f"conv3x3_{direction}", m, CASES[0]) for direction in ("fprop", "infer"))
    assert [passes("conv3x3_fprop", args) for args in fprop] == [
        ["statistics_kernel"],
        ["forward_kernel", "statistics_kernel"],
        ["forward_kernel"],
        ["forward_kernel", "statistics_kernel"],
    ]
    assert [len(passes("conv3x3_infer", args)) for args in infer] == [1, 1, 1, 2, 2, 1]
    # bprop: plain; skip; skip and factor; deferred; deferred with sums; skip; deferred with skip, twice; PReLU; sums
    bprop = [passes("conv3x3_bprop", args) for args in samples("conv3x3_bprop", m, CASES[0])]
    assert bprop[0] == []
    assert bprop[1] == ["apply_kernel", "apply_kernel"]
    assert bprop[4] == ["apply_kernel", "forward_kernel", "backward_kernel"]
    assert max(map(len, bprop)) == 4


def test_masks_of_other_channels_are_declined():
    case = CASES[0]._replace(k=12)
    args = samples("conv3x3_wgrad", maker(torch.float16), case)[2]
    reason = backends.unavailable("conv3x3_wgrad", "triton", *args)
    assert reason == "the kernel reads packed masks of channels in multiples of 8, not 12"
