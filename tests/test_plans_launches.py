"""Plans of launches: Triton's kernels, compiled or interpreted, and the extension's get this call's addresses."""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import pytest
import torch
from helpers import randn
from kernel_helpers import DEVICE
from plan_helpers import compare, draw, kept, reasons
from torch import Tensor

from resnet_fused import ops, plans, use_backend
from resnet_fused.cuda._device import run
from resnet_fused.kernels import _launch
from resnet_fused.operands import Conv, Deferred

descriptors = pytest.importorskip("triton.tools.tensor_descriptor")
pytestmark = pytest.mark.usefixtures("planning")


# --- by address -------------------------------------------------------------------------------------------------------


def _add(x: int, y: int, nothing: int, out: int, count: int, stream: int) -> None:
    """``out = x + y`` of ``count`` floats on the CPU, from addresses as a kernel gets them."""
    assert nothing == 0
    a, b, c = ((ctypes.c_float * count).from_address(at) for at in (x, y, out))
    c[:] = [i + j for i, j in zip(a, b, strict=True)]


def _launched(static, x):
    """5 x - 6 x, by way of tensors that are allocated for launches alone and one for PyTorch's operators."""
    none, twice, sums = x.new_empty(0), torch.empty_like(x), x.new_empty(3, *x.shape)
    for a, b, out in ((x, x, twice), (twice, x, sums[1]), (sums[1], twice, sums[0]), (sums[0], x, sums[2])):
        run(_add, x.device, a, b, none, out, x.numel())
    return sums[0] + sums[2].neg(), none


@pytest.mark.skipif(DEVICE != "cpu", reason="the launches run on the CPU")
def test_launches_by_address():
    xs = [(8 * x).round() for x in draw(5, 7, dtype=torch.float32)]  # sums are exact
    compare(_launched, None, *[(x,) for x in xs])
    for x in xs:
        assert torch.equal(plans.call(_launched, None, [x])[0], -x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the launches run on the CPU")
@pytest.mark.parametrize(
    ("count", "allocations"), [(40, ["1024", None]), (1 << 17, [None] * 4)], ids=["small", "large"]
)
def test_small_memory_of_launches_is_allocated_together(count, allocations):
    def function(static, x):
        a, b, wide, out = (torch.empty(n * count, device=x.device) for n in (1, 1, 2, 1))
        for source, to in ((x, a), (a, b), (b, wide[count:]), (wide[count:], out)):
            run(_add, x.device, source, source, x.new_empty(0), to, count)
        return (out,)

    for x in draw(count, dtype=torch.float32):
        assert torch.equal(plans.call(function, None, [x])[0], 16 * x)
    (source,) = kept()
    found = [line for line in source.splitlines() if "dtype=" in line]
    assert len(found) == len(allocations)
    # In it 160, 160 and 320 bytes begin at multiples of 256.
    assert all(nbytes is None or f"({nbytes}, " in line for line, nbytes in zip(found, allocations, strict=True))


def _convolutions(backend, x, scale, shift, weight, next_weight):
    """Two ops, one of which reads what the other wrote."""
    with use_backend(backend):
        y, tiles = ops.conv(weight.shape[-1]).fprop(Deferred(x, scale, shift), weight, Conv(), statistics=True)
        norm, var = ops.batch_norm.finalize(tiles, None, None, 1e-5)
        z, _ = ops.conv(next_weight.shape[-1]).fprop(
            Deferred(y, norm.scale, norm.shift), next_weight, Conv(), statistics=False
        )
    return y, *norm, var, z


@pytest.mark.parametrize("backend", ["triton", "aten", "reference"])
def test_launches_of_kernels(backend):
    rounds = []
    for seed in range(4):
        x = randn(2, 16, 5, 7, seed=seed, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last)
        scale, shift = randn(16, seed=seed + 10, device=DEVICE), randn(16, seed=seed + 20, device=DEVICE)
        weights = [randn(k, c, 1, 1, seed=seed + k, device=DEVICE, dtype=torch.float16) for k, c in ((24, 16), (8, 24))]
        rounds.append((x, scale.float(), shift.float(), *weights))
    compare(_convolutions, backend, *rounds)
    assert len(kept()) == 1, reasons()


# --- what Triton compiles: faked, since it is for GPUs alone ----------------------------------------------------------


class _Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]):
        def start(*args: Any, stream: int) -> None:
            self.calls.append((grid, stream, args))

        return start


class _Kernel:
    """Like a JIT function: the launch returns what was compiled, whose arguments come in the signature's order."""

    def __init__(self, written: Any, calls: list[Any]) -> None:
        self.signature = inspect.signature(written)
        self.arg_names = list(self.signature.parameters)
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]):
        def start(**arguments: Any) -> _Compiled:
            assert arguments.pop("num_warps") == 2
            assert arguments.pop("num_stages") == 3
            return _Compiled(self.calls)

        return start


def test_a_compiled_kernel_gets_addresses_descriptors_and_defaults():
    again: list[Any] = []  # launches by the plan
    kernel = _Kernel(lambda x, described, n, out, missing, eps=1.5, BLOCK=4: None, again)

    def function(static, x):
        a, b = torch.empty(2, 8, 8, device=x.device).unbind()
        described = descriptors.TensorDescriptor.from_tensor(a, [8, 8])
        given = {"out": b, "missing": None, "described": described, "x": x[1], "n": 7}
        _launch.launch(kernel, (3,), **given, warps=2, stages=3)
        _launch.launch(kernel, (3, 0), **given, warps=2, stages=3)  # an empty grid
        return a, b

    xs = draw(2, 4, dtype=torch.float32)
    for x in xs[:2]:
        plans.call(function, None, [x])
    assert again == []
    a, b = plans.call(function, None, [xs[2]])
    ((grid, _, arguments),) = again
    assert grid == (3, 1, 1)
    x, described, *rest = arguments
    assert x == xs[2][1].data_ptr()
    assert described.base.data_ptr() == a.data_ptr()
    assert [*described.shape, *described.strides, *described.block_shape] == [8, 8, 8, 1, 8, 8]
    assert rest == [7, b.data_ptr(), None, 1.5, 4]


def test_the_stream_is_that_of_the_call():
    streams: list[int] = []

    def launched(x: int, stream: int) -> None:
        streams.append(stream)

    def function(static, x):
        run(launched, x.device, x)
        return (torch.exp(x),)

    for x in draw(4):
        plans.call(function, None, [x])
    assert "c0(p0, stream)" in kept()[0]
    if DEVICE == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            plans.call(function, None, [x])
        assert streams[-1] == side.cuda_stream


def test_what_is_looked_up_for_a_stream_is_looked_up_again():
    found = {0: torch.zeros(3, device=DEVICE)}
    asked: list[tuple[int, int]] = []

    def look_up(stream: int, key: int) -> Tensor:
        asked.append((stream, key))
        return found[key]

    def function(static, x):
        recorder = plans.recorder()
        kept = look_up(0, 0) if recorder is None else recorder.make(0, look_up, 0)
        return (x + kept,)

    for value, x in enumerate(draw(3)):
        found[0] = torch.full((3,), float(value), device=DEVICE, dtype=torch.float64)
        assert torch.equal(plans.call(function, None, [x])[0], x + value)
    assert [key for _, key in asked] == [0] * 4
    assert kept()[0].count("(stream, 0)") == 1


def test_several_tensors_as_one_argument_are_not_planned():
    def function(static, x):
        recorder = plans.recorder()
        if recorder is not None:
            recorder.launch(print, (x, x))
        return (torch.exp(x),)

    for x in draw(4):
        plans.call(function, None, [x])
    assert reasons() == ["a launch takes several tensors as one argument"]
