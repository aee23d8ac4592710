"""Every registered op: torch.library's own checks, each backend against the reference, and the texts of its checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CONVS, ConvCase
from helpers import EPS, LAYOUTS, assert_close, dtype_id, error, is_channels_last, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from resnet_fused import backends, config, ops, reference
from resnet_fused.operands import Conv, Deferred, Gradient, Mix, Norm, TileStatistics
from resnet_fused.ops._op import ops as registered

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Error relative to the largest value, against fp64: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}

# --- samples of arguments -------------------------------------------------------------------------------------------


class Maker:
    """Tensors of one dtype and device; every call gives other values."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", layout: str = "channels_last", seed: int = 100) -> None:
        self.dtype, self.device, self.layout, self.seed = dtype, device, layout, seed
        self.wide = reference.compute_dtype(dtype)

    def activation(self, *shape: int) -> Tensor:
        self.seed += 1
        return LAYOUTS[self.layout](randn(*shape, seed=self.seed, dtype=self.dtype, device=self.device))

    def vector(self, size: int, positive: bool = False) -> Tensor:
        self.seed += 1
        return (rand if positive else randn)(size, seed=self.seed, dtype=self.wide, device=self.device)

    def weight(self, case: ConvCase) -> Tensor:
        self.seed += 1
        w = randn(*case.weight_shape, seed=self.seed, dtype=self.dtype, device=self.device)
        return w / math.sqrt(w[0].numel())

    def norm(self, size: int) -> tuple[Tensor, Tensor]:
        return self.vector(size), self.vector(size, positive=True)

    def sign(self, kind: str | None, *shape: int) -> Tensor | None:
        if kind is None:
            return None
        out = F.relu(self.activation(*shape))
        return reference.pack_mask(out > 0) if kind == "bits" else out


NONE = (None, None)
ABSENT = (None, None, None)  # a deferred input's scale, shift and slope; a plain shortcut that is not there


def conv_fprop(m: Maker, case: ConvCase) -> Iterator[tuple]:
    x, w = m.activation(case.n, case.c, case.h, case.w), m.weight(case)
    yield x, *ABSENT, w, *case.geometry, True
    yield x, *m.norm(case.c), None, w, *case.geometry, True
    yield x, *m.norm(case.c), None, w, *case.geometry, False
    yield x, *m.norm(case.c), m.vector(case.c), w, *case.geometry, True


def conv_infer(m: Maker, case: ConvCase) -> Iterator[tuple]:
    x, w, bias = m.activation(case.n, case.c, case.h, case.w), m.weight(case), m.vector(case.k)
    yield x, *ABSENT, w, bias, None, *case.geometry, True, None
    yield x, *ABSENT, w, bias, m.activation(*case.output_shape), *case.geometry, True, None
    yield x, *ABSENT, w, bias, m.activation(*case.output_shape), *case.geometry, False, None
    yield x, *m.norm(case.c), None, w, bias, m.activation(*case.output_shape), *case.geometry, True, None
    yield x, *m.norm(case.c), m.vector(case.c), w, bias, None, *case.geometry, False, m.vector(case.k)
    yield x, *ABSENT, w, bias, m.activation(*case.output_shape), *case.geometry, False, m.vector(case.k)


def _gradients(m: Maker, case: ConvCase) -> Iterator[tuple]:
    """``dz, sign, y, a, b, c`` with nothing given, frozen statistics, batch statistics."""
    shape, k = case.output_shape, case.k
    yield m.activation(*shape), *[None] * 5
    yield m.activation(*shape), m.sign("values", *shape), None, m.vector(k), None, None
    yield m.activation(*shape), m.sign("bits", *shape), m.activation(*shape), m.vector(k), m.vector(k), m.vector(k)


def _inputs(m: Maker, case: ConvCase) -> Iterator[tuple]:
    """``x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale``: plain, deferred, with everything."""
    x, shape = m.activation(case.n, case.c, case.h, case.w), (case.n, case.c, case.h, case.w)
    yield x, *ABSENT, *NONE, *NONE, 1.0
    yield x, *ABSENT, *NONE, m.activation(*shape), m.sign("bits", *shape), 1.0
    yield x, *ABSENT, *NONE, m.activation(*shape), m.sign("values", *shape), 0.5
    yield x, *m.norm(case.c), None, *NONE, *NONE, 1.0
    yield x, *m.norm(case.c), None, *m.norm(case.c), *NONE, 1.0
    yield x, *ABSENT, *NONE, m.activation(*shape), None, -0.3
    yield x, *m.norm(case.c), None, *m.norm(case.c), m.activation(*shape), None, 1.7
    yield x, *m.norm(case.c), m.vector(case.c), *m.norm(case.c), m.activation(*shape), m.sign("bits", *shape), 0.5
    yield x, *m.norm(case.c), m.vector(case.c), *NONE, *NONE, 1.0


def _pairs(m: Maker, case: ConvCase) -> Iterator[tuple[tuple, tuple]]:
    gradients, inputs = list(_gradients(m, case)), list(_inputs(m, case))
    yield from ((gradients[i % len(gradients)], given) for i, given in enumerate(inputs))
    yield gradients[2], inputs[4]


def conv_dgrad(m: Maker, case: ConvCase) -> Iterator[tuple]:
    w = m.weight(case)
    yield from ((*grad, w, *given, *case.geometry) for grad, given in _pairs(m, case))


def conv_wgrad(m: Maker, case: ConvCase) -> Iterator[tuple]:
    w = m.weight(case)
    yield from ((*grad, w, *given[:4], *case.geometry, m.wide) for grad, given in _pairs(m, case))


def conv_bprop(m: Maker, case: ConvCase) -> Iterator[tuple]:
    w = m.weight(case)
    yield from ((*grad, w, *given, *case.geometry, m.wide) for grad, given in _pairs(m, case))


SHAPE = (2, 3, 5, 7)


def bn_statistics(m: Maker) -> Iterator[tuple]:
    yield (m.activation(*SHAPE),)
    yield (m.activation(1, 4, 1, 1),)


def _tiles(m: Maker) -> tuple:
    counts = torch.tensor([4, 0, 9], dtype=torch.int32, device=m.device)
    mean, m2 = (torch.stack([m.vector(5, positive=True) for _ in range(3)]) for _ in range(2))
    return counts, mean, m2


def bn_merge(m: Maker) -> Iterator[tuple]:
    yield _tiles(m)
    yield tuple(t[:1] for t in _tiles(m))


def bn_finalize(m: Maker) -> Iterator[tuple]:
    yield *_tiles(m), m.vector(5), m.vector(5), 1e-5
    yield *_tiles(m), m.vector(5).to(m.dtype), None, 1e-3
    yield *(t[2:] for t in _tiles(m)), None, m.vector(5), 0.0


def bn_coefficients(m: Maker) -> Iterator[tuple]:
    counts = torch.tensor([4, 9], dtype=torch.int32, device=m.device)
    yield m.vector(5), m.vector(5), m.vector(5), *m.norm(5), counts
    yield m.vector(5), m.vector(5), None, *m.norm(5), counts[:1]


PLAIN = [1.0, 0.0, 1.0, 0.0]
GATES = ((2, 3, 5, 7), (2, 1, 1, 1), (2, 3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1))
# gate, mix, branch_relu
MIXES = (
    (None, PLAIN, False),
    (None, [0.5, 0.0, 0.3, 0.0], False),
    (None, [0.7, 0.0, 1.0, 0.0], True),
    (None, [1.0, 0.0, 0.0, 0.0], False),
    (GATES[0], [0.0, 1.0, 1.0, -1.0], False),
    (GATES[1], [0.0, 1.0, 1.0, 0.0], False),
    (GATES[2], [0.0, 1.0, 1.0, 0.0], True),
    (GATES[3], [0.5, -1.5, 2.0, 0.25], True),
    (GATES[4], [1.0, 0.0, 0.0, 1.0], False),
)


def _terms(m: Maker) -> Iterator[tuple]:
    """``y, scale, shift, shortcut, scale, shift, gate, mix, branch_relu``; the first three are a plain sum's."""
    y, s = m.activation(*SHAPE), m.activation(*SHAPE)
    yield y, *m.norm(3), None, *NONE, None, PLAIN, False
    yield y, *m.norm(3), s, *NONE, None, PLAIN, False
    yield y, *m.norm(3), s, *m.norm(3), None, PLAIN, False
    summands = ((*m.norm(3), s, *NONE), (*m.norm(3), s, *m.norm(3)), (*NONE, s, *NONE), (*NONE, *ABSENT))
    for i, (gate, mix, branch_relu) in enumerate(MIXES):
        for j in range(i % 2, 4, 2):
            # A gate's dtype is its own: that of the activations, or the accumulation's.
            g = None if gate is None else m.activation(*gate).to(m.wide if j == 3 else m.dtype)
            yield y, *summands[j], g, mix, branch_relu


def bn_add_relu_forward(m: Maker) -> Iterator[tuple]:
    """ReLU with mask, none with statistics, PReLU; the first four without a mask or a shortcut, with each shortcut."""
    for i, terms in enumerate(_terms(m)):
        relu, slope = (True, None) if i < 3 else ((False, None), (True, None), (False, m.vector(3)))[i % 3]
        yield *terms, relu, slope, relu and i > 0, i > 2


def bn_add_relu_backward(m: Maker) -> Iterator[tuple]:
    dout = m.activation(*SHAPE)
    for i, (y, scale, shift, s, s_scale, s_shift, gate, mix, branch_relu) in enumerate(_terms(m)):
        sign = (m.sign("values", *SHAPE), m.sign("bits", *SHAPE), None)[i % 3]
        slope = m.vector(3) if sign is None and i > 2 else None
        sums = NONE if scale is None or i % 4 == 3 else m.norm(3)
        s_sums = NONE if s_scale is None or i % 5 == 3 else m.norm(3)
        need_shortcut, need_gate = s is not None and i % 4 < 3, gate is not None
        first, second = (y, scale, shift, *sums), (s, s_scale, s_shift, *s_sums)
        yield dout, sign, *first, *second, gate, mix, branch_relu, slope, need_shortcut, need_gate


def bn_add_relu_mask(m: Maker) -> Iterator[tuple]:
    yield m.activation(*SHAPE), m.sign("bits", *SHAPE)
    yield m.activation(*SHAPE), m.sign("values", *SHAPE)


def bn_add_relu_reduce(m: Maker) -> Iterator[tuple]:
    dz, y = m.activation(*SHAPE), m.activation(*SHAPE)
    yield dz, None, y, *m.norm(3), None, *NONE
    yield dz, m.sign("bits", *SHAPE), y, *m.norm(3), m.activation(*SHAPE), *m.norm(3)
    yield dz, m.sign("values", *SHAPE), y, *m.norm(3), m.activation(*SHAPE), *m.norm(3)


def bn_add_relu_apply(m: Maker) -> Iterator[tuple]:
    dz, y, skip = m.activation(*SHAPE), m.activation(*SHAPE), m.activation(*SHAPE)
    yield dz, None, y, m.vector(3), None, None, *NONE, 1.0
    yield dz, m.sign("bits", *SHAPE), y, m.vector(3), m.vector(3), m.vector(3), *NONE, 1.0
    yield dz, m.sign("values", *SHAPE), y, m.vector(3), m.vector(3), m.vector(3), skip, m.sign("bits", *SHAPE), 0.5
    yield dz, None, y, *ABSENT, *NONE, 1.0
    yield dz, None, y, *ABSENT, skip, None, -1.5
    yield dz, None, y, m.vector(3), None, None, skip, m.sign("values", *SHAPE), 1.0


def bn_add_relu_pool(m: Maker) -> Iterator[tuple]:
    yield m.activation(*SHAPE), *NONE
    yield m.activation(*SHAPE), *m.norm(3)


def bn_add_relu_spread(m: Maker) -> Iterator[tuple]:
    yield m.activation(*SHAPE), m.activation(2, 3, 1, 1)
    yield m.activation(*SHAPE), m.activation(2, 3, 1, 1).to(m.wide)


POOLED = (2, 3, 3, 4)


def stem_forward(m: Maker) -> Iterator[tuple]:
    yield m.activation(*SHAPE), *m.norm(3)
    yield m.activation(2, 3, 1, 6), *m.norm(3)


def stem_infer(m: Maker) -> Iterator[tuple]:
    case = CONVS[0]._replace(kernel=7, c=3, k=4)
    yield m.activation(2, 3, 11, 9), m.weight(case), m.vector(4), 2, 3
    yield m.activation(2, 3, 8, 8), m.weight(case._replace(kernel=3)), m.vector(4), 1, 0


def stem_reduce(m: Maker) -> Iterator[tuple]:
    yield m.activation(*POOLED), m.activation(*SHAPE), *m.norm(3), *m.norm(3)


def stem_apply(m: Maker) -> Iterator[tuple]:
    yield m.activation(*POOLED), m.activation(*SHAPE), *m.norm(3), m.vector(3), None, None
    yield m.activation(*POOLED), m.activation(*SHAPE), *m.norm(3), m.vector(3), m.vector(3), m.vector(3)


def stem_backward(m: Maker) -> Iterator[tuple]:
    counts = torch.tensor([70], dtype=torch.int32, device=m.device)
    tensors = m.activation(*POOLED), m.activation(*SHAPE), *m.norm(3), *m.norm(3)
    yield *tensors, m.vector(3), counts
    yield *tensors, None, counts
    yield *tensors, m.vector(3), None


DIRECTIONS = {
    "fprop": conv_fprop, "infer": conv_infer, "dgrad": conv_dgrad, "wgrad": conv_wgrad, "bprop": conv_bprop
}  # fmt: skip
POINTWISE = {
    function.__name__: function
    for function in (
        bn_statistics, bn_merge, bn_finalize, bn_coefficients,
        bn_add_relu_forward, bn_add_relu_backward, bn_add_relu_mask, bn_add_relu_reduce, bn_add_relu_apply,
        bn_add_relu_pool, bn_add_relu_spread,
        stem_forward, stem_infer, stem_reduce, stem_apply, stem_backward,
    )
}  # fmt: skip
CONV_OPS = {f"conv{kernel}x{kernel}_{direction}": kernel for kernel in (1, 3) for direction in DIRECTIONS}


def samples(name: str, m: Maker, case: ConvCase | None = None) -> list[tuple]:
    """Arguments for the op ``name``: every combination of optional arguments that the package uses."""
    if name in POINTWISE:
        return list(POINTWISE[name](m))
    default = CONVS[1] if CONV_OPS[name] == 1 else CONVS[8]
    return list(DIRECTIONS[name.partition("_")[2]](m, case or default))


def test_every_op_has_samples():
    assert set(registered) == set(POINTWISE) | set(CONV_OPS)
    assert set(backends.operations()) == set(registered)


# --- torch.library --------------------------------------------------------------------------------------------------

every_op = pytest.mark.parametrize("name", sorted(registered))


@every_op
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck(name, dtype, device):
    """Schema (nothing mutated, nothing aliased), fake against real, and AOT dispatch with dynamic shapes."""
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32:
        utils.append("test_aot_dispatch_dynamic")
    for args in samples(name, Maker(dtype, device)):
        torch.library.opcheck(registered[name].overload, args, test_utils=utils)


@every_op
def test_every_backend_gives_what_the_fake_promises(name):
    """Shapes, dtypes and strides, for each backend and not only the one that is chosen."""
    for dtype in DTYPES:
        for args in samples(name, Maker(dtype)):
            promised = flatten(registered[name].overload(*fake(args)))
            for backend in runnable(name, args):
                for t, expected in zip(flatten(run(backend, name, args)), promised, strict=True):
                    assert (t.shape, t.dtype) == (expected.shape, expected.dtype), backend
                    assert t.numel() == 0 or strides(t) == strides(expected), backend


@every_op
def test_meta_tensors_give_shapes(name):
    for args in samples(name, Maker(torch.float32)):
        promised = flatten(registered[name].overload(*fake(args)))
        found = flatten(registered[name].overload(*(a.to("meta") if isinstance(a, Tensor) else a for a in args)))
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in promised]


# --- backends -------------------------------------------------------------------------------------------------------


def flatten(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def strides(t: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def fake(args: tuple) -> list:
    mode = FakeTensorMode()
    return [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]


def run(backend: str, name: str, args: tuple) -> Any:
    with backends.use_backend(backend):
        return registered[name](*args)


def runnable(name: str, args: tuple) -> list[str]:
    """The backends that can run ``name`` on these arguments on this machine."""
    return [b for b in config.BACKENDS if backends.unavailable(name, b, *args) is None]


def exact(name: str, args: tuple) -> tuple[Tensor, ...]:
    """The reference on fp64 copies."""
    wide = [a.double().cpu() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    wide = [a.cpu() if isinstance(a, Tensor) else torch.float64 if isinstance(a, torch.dtype) else a for a in wide]
    return flatten(getattr(reference, name if name in POINTWISE else f"conv_{name.partition('_')[2]}")(*wide))


def compare(name: str, args: tuple, dtype: torch.dtype, *, interpret: bool = True) -> None:
    """Every backend against fp64, twice for the same bits, arguments left alone, activations in channels_last.

    Kernels that would be interpreted, which takes long, join in with ``interpret``.
    """
    expected = exact(name, args)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    chosen = [b for b in runnable(name, args) if interpret or b != "triton" or not config.triton_interprets()]
    assert "reference" in chosen
    for backend in chosen:
        found = flatten(run(backend, name, args))
        for i, (t, e) in enumerate(zip(found, expected, strict=True)):
            assert_close(t, e, TOLERANCE[dtype], f"{backend}, output {i}")
            if t.dim() == 4 and not (name.endswith("wgrad") or (name.endswith("bprop") and i == 4)):
                assert is_channels_last(t), f"{backend}, output {i}"
        assert all(torch.equal(a, b) for a, b in zip(found, flatten(run(backend, name, args)), strict=True)), backend
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor)), backend


@every_op
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=dtype_id)
def test_backends(name, dtype, layout, device):
    # A layout decides what is copied before a kernel runs, whatever the dtype: one that is copied, in one dtype.
    interpret = layout == "channels_last" or (layout, dtype) == ("sliced", torch.float16)
    for args in samples(name, Maker(dtype, device, layout)):
        compare(name, args, dtype, interpret=interpret)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_conv_backends_on_every_shape(case, direction):
    for args in samples(f"conv{case.kernel}x{case.kernel}_{direction}", Maker(torch.float64), case):
        compare(f"conv{case.kernel}x{case.kernel}_{direction}", args, torch.float64)


@st.composite
def conv_cases(draw) -> ConvCase:
    kernel = draw(st.sampled_from([1, 3]))
    groups = 1 if kernel == 1 else draw(st.integers(1, 3))
    size = st.integers(1, 9)
    return ConvCase(
        kernel, draw(st.integers(1, 3)), groups * draw(st.integers(1, 4)), draw(size), draw(size),
        groups * draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), groups, "drawn",
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=30)
@given(
    case=conv_cases(), dtype=st.sampled_from(DTYPES[:2]), layout=st.sampled_from(list(LAYOUTS)), seed=st.integers(0, 9)
)
def test_conv_backends_on_drawn_shapes(direction, case, dtype, layout, seed):
    name = f"conv{case.kernel}x{case.kernel}_{direction}"
    for args in samples(name, Maker(dtype, "cpu", layout, 1000 * seed), case):
        compare(name, args, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
def test_a_bound_convolution_is_infer(case, dtype):
    """Bound to one input and called with others; the residual is written to only where that was allowed."""
    m, conv = Maker(dtype), Conv(*case.geometry)
    name, op = f"conv{case.kernel}x{case.kernel}_infer", ops.conv(case.kernel)
    for overwrite in (False, True):
        for args in samples(name, m, case):
            x, scale, shift, slope, w, bias, residual, *_, relu, out_slope = args
            deferred = x if scale is None else Deferred(x, scale, shift, slope)
            given = {"residual": residual, "relu": relu, "slope": out_slope}
            bound = op.bind(deferred, w, bias, conv, **given, overwrite_residual=overwrite)
            for _ in range(2):
                x = m.activation(*x.shape)
                residual = None if residual is None else m.activation(*residual.shape)
                expected = exact(name, (x, *args[1:6], residual, *args[7:]))[0]
                kept = None if residual is None or overwrite else residual.clone()
                out = bound(x, residual)
                assert_close(out, expected, TOLERANCE[dtype])
                assert is_channels_last(out)
                assert out.dtype == dtype
                assert kept is None or torch.equal(residual, kept)


@every_op
def test_a_consuming_call_gives_the_same(name):
    """It may write over the gradients that come in: the first argument and dgrad's skip."""
    lost = (0, 13) if name.endswith("bprop") else (0,)
    for dtype in DTYPES:
        for args in samples(name, Maker(dtype)):
            for backend in runnable(name, args):
                expected = flatten(run(backend, name, args))
                own = [a.clone() if i in lost and a is not None else a for i, a in enumerate(args)]
                before = [a.clone() if isinstance(a, Tensor) else a for a in own]
                with backends.use_backend(backend):
                    found = flatten(registered[name].consume(*own))
                for a, e in zip(found, expected, strict=True):
                    assert_close(a, e, TOLERANCE[dtype], backend)
                kept = [(a, b) for i, (a, b) in enumerate(zip(own, before, strict=True)) if i not in lost]
                assert all(torch.equal(a, b) for a, b in kept if isinstance(a, Tensor)), backend


@pytest.mark.parametrize("weights", ["contiguous", "channels_last", "sliced"])
def test_conv_backends_with_weights_of_any_strides(weights):
    case = CONVS[8]
    for direction in DIRECTIONS:
        for args in samples(f"conv3x3_{direction}", Maker(torch.float32), case):
            at = {"fprop": 4, "infer": 4}.get(direction, 6)
            layout = LAYOUTS["nchw" if weights == "contiguous" else weights]
            compare(f"conv3x3_{direction}", (*args[:at], layout(args[at]), *args[at + 1 :]), torch.float32)


@pytest.mark.parametrize("name", ["conv1x1_fprop", "conv3x3_fprop", "bn_statistics"])
def test_no_backend_loses_the_variance_under_a_large_mean(name):
    """Mean 1e4 deviations from 0, where fp32 E[x^2] - E[x]^2 has no right digit."""
    y = (randn(4, 3, 16, 16) + 1e4).float()
    if name == "bn_statistics":
        args = (y,)
    else:
        kernel = CONV_OPS[name]
        w = torch.zeros(3, 3, kernel, kernel)
        w[range(3), range(3), kernel // 2, kernel // 2] = 1
        args = (y, *ABSENT, w, 1, 1, 1, True)
    for backend in runnable(name, args):
        counts, mean, m2 = flatten(run(backend, name, args))[-3:]
        total, merged, deviation = reference.bn_merge(counts, mean.double(), m2.double())
        assert_close(merged[0], y.double().mean((0, 2, 3)), 1e-6, backend)
        assert_close(deviation[0] / total, y.double().var((0, 2, 3), correction=0), 1e-3, backend)


def test_no_backend_counts_an_empty_tensor():
    """What a rank without images sends to the others: count 0."""
    args = torch.empty(0, 3, 4, 4), *ABSENT, torch.ones(2, 3, 3, 3), 1, 1, 1, True
    for backend in runnable("conv3x3_fprop", args):
        y, *tile = run(backend, "conv3x3_fprop", args)
        assert y.shape == (0, 2, 4, 4)
        assert tile[0].tolist() == [0]
        tiles = reference.bn_statistics(torch.ones(1, 2, 2, 2)), tile
        merged = reference.bn_merge(*(torch.cat(parts) for parts in zip(*tiles, strict=True)))
        assert [t.flatten().tolist() for t in merged] == [[4], [1, 1], [0, 0]]


def _composed(y, scale, shift, s, s_scale, s_shift, gate, mix, branch_relu, relu, slope):
    """The block's end as eager PyTorch runs it in the dtype of ``y``; batch norms give their scale and shift."""

    def norm(t, scale, shift):
        if scale is None:
            return t
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.batch_norm(t, scale, shift, zero, one, False, 0.0, 0.0, False)

    def weigh(t, constant, factor):
        if factor == 0:
            return t if constant == 1 else t * constant
        return t * (gate * factor + constant)

    f = norm(y, scale, shift)
    total = weigh(F.relu(f) if branch_relu else f, *mix[:2])
    if s is not None and (mix[2] or mix[3]):
        total = total + weigh(norm(s, s_scale, s_shift), *mix[2:])
    if slope is not None:
        return F.prelu(total, slope.to(total.dtype))
    return F.relu(total) if relu else total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_sixteen_bit_block_ends_are_as_exact_as_pytorchs(dtype):
    """Forward and backward against fp64, beside PyTorch's composition of the same operands in that dtype."""
    m = Maker(dtype)
    for i, (y, scale, shift, s, s_scale, s_shift, gate, mix, branch_relu) in enumerate(_terms(m)):
        slope, dout = (m.vector(3) if i % 3 == 0 else None), m.activation(*SHAPE)
        gate = None if gate is None else gate.to(dtype)
        terms = (y, scale, shift, s, s_scale, s_shift, gate, mix, branch_relu)

        def composed(convert, terms=terms, slope=slope, dout=dout, mix=mix, branch_relu=branch_relu):
            """``out`` and the gradients of the summands, the gate and the slopes."""
            leaves = [None if t is None else convert(t).requires_grad_() for t in (terms[0], terms[3], terms[6], slope)]
            vectors = [None if v is None else v.to(leaves[0].dtype).float() for v in (*terms[1:3], *terms[4:6])]
            vectors = [v if v is None or leaves[0].dtype != torch.float64 else v.double() for v in vectors]
            y, s, gate, slope_ = leaves
            out = _composed(y, *vectors[:2], s, *vectors[2:], gate, mix, branch_relu, False, slope_)
            wanted = [t for t in leaves if t is not None]
            found = iter(torch.autograd.grad(out, wanted, convert(dout), allow_unused=True))
            return [out.detach(), *(None if t is None else next(found) for t in leaves)]

        exact, theirs = composed(torch.Tensor.double), composed(torch.clone)
        out, *_ = registered["bn_add_relu_forward"](*terms, False, slope, False, False)
        found = registered["bn_add_relu_backward"](
            dout, None, y, scale, shift, *NONE, s, s_scale, s_shift, *NONE, gate, mix, branch_relu, slope,
            s is not None, gate is not None,
        )  # fmt: skip
        dy = found[0] if scale is None else found[0].double() * scale.double().view(1, -1, 1, 1)
        ds = None if s is None else found[1]
        ds = ds if ds is None or s_scale is None else ds.double() * s_scale.double().view(1, -1, 1, 1)
        ours = (out, dy, ds, found[6] if gate is not None else None, found[7] if slope is not None else None)
        for name, a, b, e in zip(("out", "dy", "ds", "dgate", "dslope"), ours, theirs, exact, strict=True):
            if a is not None and e is not None:
                assert error(a, e) <= 2 * error(b, e) + 2 * EPS[dtype], f"{name} of {i}: {mix}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_summands_of_unlike_dtypes(dtype):
    """As under autocast: the branch has 16 bits, the shortcut 32, or the other way about."""
    m, other = Maker(dtype), Maker(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    dout, s = m.activation(*SHAPE), other.activation(*SHAPE)
    for gate, mix, branch_relu in MIXES:
        g = None if gate is None else other.activation(*gate)
        terms = (m.activation(*SHAPE), *m.norm(3), s, *NONE, g, mix, branch_relu)
        compare("bn_add_relu_forward", (*terms, False, None, False, True), torch.bfloat16)
        y, scale, shift, *rest = terms
        args = (dout, None, y, scale, shift, *m.norm(3), *rest[:3], *NONE, *rest[3:], None, True, gate is not None)
        compare("bn_add_relu_backward", args, torch.bfloat16)
        assert registered["bn_add_relu_backward"](*args)[1].dtype == s.dtype


@every_op
def test_nan_is_never_lost(name):
    """A NaN in an activation reaches the output of every backend where it reaches the reference's."""
    m = Maker(torch.float64)
    for args in samples(name, m):
        first = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 4), None)
        if first is None:
            pytest.skip("no activation among the arguments")
        poisoned = args[first].clone()
        poisoned[0, 0, 0, 0] = math.nan
        args = (*args[:first], poisoned, *args[first + 1 :])
        expected = flatten(run("reference", name, args))
        for backend in runnable(name, args):
            for t, e in zip(flatten(run(backend, name, args)), expected, strict=True):
                assert torch.equal(t.isnan(), e.isnan()), backend


# --- what the wrappers hand on --------------------------------------------------------------------------------------


def test_wrappers_take_the_operands_apart():
    """The typed wrappers pass every field in the flat argument's place."""
    m, case = Maker(torch.float64), CONVS[8]
    conv, w = Conv(*case.geometry), m.weight(case)
    x, norm = m.activation(case.n, case.c, case.h, case.w), Norm(*(m.vector(case.c) for _ in range(4)))
    deferred = Deferred(x, norm.scale, norm.shift, m.vector(case.c))
    dz, y = m.activation(*case.output_shape), m.activation(*case.output_shape)
    grad = Gradient(dz, m.sign("bits", *dz.shape), y, *(m.vector(case.k) for _ in range(3)))
    skip = Gradient(m.activation(*x.shape), m.sign("values", *x.shape))

    def same(found, expected):
        found, expected = flatten(found), flatten(expected)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    y_, tiles = ops.conv3x3.fprop(deferred, w, conv, statistics=True)
    same((y_, *tiles), registered["conv3x3_fprop"](*deferred, w, *conv, True))
    bias = norm.shift[:4].clone()
    same(
        ops.conv3x3.infer(x, w, bias, conv, residual=dz, relu=False),
        registered["conv3x3_infer"](x, *ABSENT, w, bias, dz, *conv, False, None),
    )
    for args in (deferred, deferred._replace(slope=None)):
        same(
            ops.conv3x3.infer(args, w, bias, conv, slope=bias),
            registered["conv3x3_infer"](*args, w, bias, None, *conv, False, bias),
        )
    flat = (*grad, w, *deferred, norm.mean, norm.rstd, skip.dz, skip.sign, 0.5, *conv)
    same(
        ops.conv3x3.dgrad(grad, w, deferred, norm, conv, skip=skip, skip_scale=0.5),
        registered["conv3x3_dgrad"](*flat),
    )
    same(
        ops.conv3x3.bprop(grad, w, deferred, norm, conv, dtype=torch.float32, skip=skip, skip_scale=0.5),
        registered["conv3x3_bprop"](*flat, torch.float32),
    )
    same(
        ops.conv3x3.dgrad(grad, w, x, None, conv, skip=skip),
        registered["conv3x3_dgrad"](*grad, w, x, *ABSENT, None, None, skip.dz, skip.sign, 1.0, *conv),
    )
    same(
        ops.conv3x3.wgrad(grad, w, deferred, conv, dtype=torch.float32),
        registered["conv3x3_wgrad"](*grad, w, *deferred, *conv, torch.float32),
    )
    tiles = TileStatistics(*_tiles(m))
    resolved, var = ops.batch_norm.finalize(tiles, tiles.mean[0], None, 1e-3)
    same((*resolved, var), registered["bn_finalize"](*tiles, tiles.mean[0], None, 1e-3))


def test_the_wrappers_of_the_block_end():
    """Every operand in its place, defaults of the plain sum, and None for whatever was not asked for."""
    m = Maker(torch.float64)
    y, s, dout = (m.activation(*SHAPE) for _ in range(3))
    norms = [Norm(*(m.vector(3) for _ in range(4))) for _ in range(2)]
    scale, shift, mean, _ = norms[0]
    s_scale, s_shift, *_ = norms[1]
    end, added = Deferred(y, scale, shift), Deferred(s, s_scale, s_shift)
    mix, gate, slope = Mix(0.5, -1.5, 2.0, 0.25), m.activation(2, 3, 1, 1), m.vector(3)
    call = ops.bn_add_relu

    out, sign, tiles = call.forward(end, added, sign=True)
    terms = (y, scale, shift, s, s_scale, s_shift)
    found = registered["bn_add_relu_forward"](*terms, None, PLAIN, False, True, None, False, False)
    assert torch.equal(out, found[0])
    assert sign is out  # on the CPU
    assert [t.shape[0] for t in tiles] == [0, 0, 0]
    assert call.forward(end, added, sign=False)[1] is None
    assert call.forward(end, added, sign=True, relu=False)[1] is None

    mixed = {"mix": mix, "gate": gate, "branch_relu": True}
    out, sign, tiles = call.forward(end, s, sign=True, slope=slope, statistics=True, **mixed)
    args = (y, scale, shift, s, *NONE, gate, [*mix], True, False, slope, False, True)
    found = registered["bn_add_relu_forward"](*args)
    assert sign is None
    assert all(torch.equal(a, b) for a, b in zip((out, *tiles), (found[0], *found[2:]), strict=True))

    asked = {"sums": True, "need_shortcut": True, "need_gate": True}
    grads = call.backward(dout, None, y, norms[0], s, norms[1], slope=slope, **mixed, **asked)
    args = (dout, None, y, *norms[0], s, *norms[1], gate, [*mix], True, slope, True, True)
    assert all(torch.equal(a, b) for a, b in zip(grads, registered["bn_add_relu_backward"](*args), strict=True))
    asked = {"sums": False, "need_shortcut": False, "need_gate": False}
    grads = call.backward(dout, out, y, norms[0], s, norms[1], slope=None, **mixed, **asked)
    assert grads[1:] == (None,) * 7

    plain = {"mix": Mix(0.5), "gate": None, "branch_relu": False, "slope": None, "need_gate": False}
    given = {"sums": False, "need_shortcut": True}
    assert call.backward(dout, None, y, None, s, None, **plain, **given).dshortcut is dout
    assert torch.equal(call.backward(dout, out, y, None, s, None, **plain, **given).dshortcut, dout * (out > 0))
    other = call.backward(dout, None, y, None, s.float(), None, **plain, **given).dshortcut
    assert torch.equal(other, dout.float())

    grad, skip = Gradient(dout, out, y, scale, shift, mean), Gradient(s, y)
    assert torch.equal(
        call.apply(grad, y, skip=skip, skip_scale=0.5),
        registered["bn_add_relu_apply"](dout, out, y, scale, shift, mean, s, y, 0.5),
    )
    assert torch.equal(
        call.apply(Gradient(dout), y), registered["bn_add_relu_apply"](dout, None, y, *ABSENT, *NONE, 1.0)
    )
    assert torch.equal(call.pool(end), registered["bn_add_relu_pool"](y, scale, shift))
    assert torch.equal(call.pool(y), registered["bn_add_relu_pool"](y, None, None))
    assert torch.equal(call.spread(dout, gate), registered["bn_add_relu_spread"](dout, gate))


def test_compiled_in_one_graph():
    """``mix`` is a constant of the graph; whatever depends on the gate is not."""
    m = Maker(torch.float32)
    y, s, slope = m.activation(*SHAPE), m.activation(*SHAPE), m.vector(3)
    end, mix = Deferred(y, *m.norm(3)), Mix(0.5, -1.5, 2.0, 0.25)
    w, conv = m.weight(CONVS[0]._replace(c=3, k=3)), Conv()

    def run(y, s, gate):
        out, *_ = ops.bn_add_relu.forward(end._replace(y=y), s, sign=False, mix=mix, gate=gate, slope=slope)
        grads = ops.bn_add_relu.backward(
            out, None, y, None, s, None, mix=mix, gate=gate, branch_relu=False, slope=slope, sums=False,
            need_shortcut=True, need_gate=True,
        )  # fmt: skip
        read = Deferred(out, end.scale, end.shift, slope)
        z, _ = ops.conv1x1.fprop(read, w, conv, statistics=False)
        dx, *_ = ops.conv1x1.dgrad(Gradient(z), w, read, None, conv, skip=Gradient(s), skip_scale=0.5)
        return out, grads.dz, grads.dshortcut, grads.dgate, ops.bn_add_relu.spread(dx, ops.bn_add_relu.pool(z))

    for gate in (m.activation(2, 3, 1, 1), m.activation(2, 3, 1, 1)):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(y, s, gate), run(y, s, gate), strict=True):
            assert_close(a, b, 1e-6)


def test_an_activation_of_its_own_is_refused_where_there_is_none():
    m = Maker(torch.float32)
    y = Deferred(m.activation(*SHAPE), *m.norm(3), m.vector(3))
    text = r"without a slope of its own, got shape \(3,\)"
    with pytest.raises(ValueError, match=f"bn_add_relu: expected y {text}"):
        ops.bn_add_relu.forward(y, None, sign=False)
    with pytest.raises(ValueError, match=f"bn_add_relu: expected shortcut {text}"):
        ops.bn_add_relu.forward(y.y, y, sign=False)
    with pytest.raises(ValueError, match=f"bn_add_relu: expected y {text}"):
        ops.bn_add_relu.pool(y)
    with pytest.raises(ValueError, match=r"stem_forward: expected y without a slope, got shape \(3,\)"):
        ops.stem.forward(y)


def test_frozen_statistics():
    mean, var, gamma, beta = randn(4), rand(4), randn(4, seed=1), randn(4, seed=2)
    y = randn(2, 4, 3, 3)
    for weight, bias in ((gamma, beta), (None, None), (gamma, None)):
        norm = ops.batch_norm.frozen(weight, bias, mean, var, 1e-2, torch.float64)
        expected = F.batch_norm(y, mean, var, weight, bias, False, 0.0, 1e-2)
        assert_close(reference.affine(y, norm.scale, norm.shift), expected, 1e-13)
        assert torch.equal(norm.mean, mean)
        assert_close(norm.rstd, 1 / (var + 1e-2).sqrt(), 1e-14)


# --- checks ---------------------------------------------------------------------------------------------------------


def elsewhere(t: Tensor) -> Tensor:
    return t.to("meta")


def wider(t: Tensor) -> Tensor:
    return torch.cat([t, t[:, :1] if t.dim() > 1 else t[:1]], min(1, t.dim() - 1))


def drop(_: Any) -> None:
    return None


FPROP, DGRAD, INFER, END, BACK = (
    "conv3x3_fprop", "conv3x3_dgrad", "conv3x3_infer", "bn_add_relu_forward", "bn_add_relu_backward"
)  # fmt: skip
EXCLUSIVE = next(i for i, terms in enumerate(_terms(Maker(torch.float32))) if terms[6] is not None)
SLOPED = next(i for i, args in enumerate(bn_add_relu_backward(Maker(torch.float32))) if args[15] is not None)
# op, index of the sample, index of the argument, what is done to it, error, text
REFUSED = [
    (FPROP, 0, 0, lambda x: x[0], ValueError, r"x of 4 dimensions \(N, C, H, W\), got shape \(6, 5, 5\)"),
    (FPROP, 0, 0, lambda x: x.to(torch.int32), TypeError, "x of dtype float32, .*, got torch.int32"),
    (FPROP, 0, 0, wider, ValueError, r"x of 6 channels \(weight \(4, 3, 3, 3\), groups 2\), got 7"),
    (FPROP, 0, 4, lambda w: w.half(), TypeError, "weight of x's dtype torch.float32, got torch.float16"),
    (FPROP, 0, 4, lambda w: w[..., :1], ValueError, r"weight of shape \(K, C / groups, 3, 3\), got"),
    (FPROP, 0, 4, lambda w: w[:3], ValueError, "weight with output channels divisible by groups 2, got 3"),
    (FPROP, 0, 4, elsewhere, ValueError, "weight on x's device cpu, got device meta"),
    (FPROP, 0, 5, lambda _: -1, ValueError, "stride >= 1, got -1"),
    (FPROP, 0, 5, lambda _: 0, ValueError, "stride >= 1, got 0"),
    (FPROP, 0, 6, lambda _: 0, ValueError, "dilation >= 1, got 0"),
    (FPROP, 0, 7, lambda _: -2, ValueError, "groups >= 1, got -2"),
    (FPROP, 1, 1, drop, ValueError, "scale and shift all given or all None, got None for scale"),
    (FPROP, 1, 2, wider, ValueError, r"shift of shape \(6,\), got shape \(7,\)"),
    (FPROP, 1, 1, lambda v: v.double(), TypeError, "scale of dtype torch.float32, got torch.float64"),
    (FPROP, 1, 1, elsewhere, ValueError, "scale on device cpu, got device meta"),
    (FPROP, 3, 3, wider, ValueError, r"slope of shape \(6,\), got shape \(7,\)"),
    (FPROP, 0, 3, lambda _: torch.ones(6), ValueError, "scale and shift with slope, got None"),
    ("conv1x1_fprop", 0, 7, lambda _: 2, ValueError, "groups of 1, got 2"),
    (INFER, 0, 5, wider, ValueError, r"bias of shape \(4,\), got shape \(5,\)"),
    (INFER, 1, 6, wider, ValueError, r"residual of shape \(2, 4, 5, 5\), got shape \(2, 5, 5, 5\)"),
    (INFER, 1, 6, lambda r: r.double(), TypeError, "residual of x's dtype torch.float32, got torch.float64"),
    (INFER, 1, 6, elsewhere, ValueError, "residual on x's device cpu, got device meta"),
    (INFER, 0, 3, lambda _: torch.ones(6), ValueError, "scale and shift with slope, got None"),
    (INFER, 3, 2, drop, ValueError, "scale and shift all given or all None, got None for shift"),
    (INFER, 4, 10, lambda _: True, ValueError, "relu False with out_slope, got True"),
    (INFER, 4, 11, wider, ValueError, r"out_slope of shape \(4,\), got shape \(5,\)"),
    (INFER, 4, 11, lambda v: v.half(), TypeError, "out_slope of dtype torch.float32, got torch.float16"),
    (DGRAD, 0, 0, lambda t: t[:1], ValueError, r"dz of the output's shape \(2, 4, 5, 5\), got shape \(1, 4, 5, 5\)"),
    (DGRAD, 0, 0, elsewhere, ValueError, "dz on x's device cpu, got device meta"),
    (DGRAD, 2, 1, lambda s: s[1:], ValueError, r"sign of shape \(25,\), one bit .*, got shape \(24,\)"),
    (DGRAD, 2, 4, drop, ValueError, "y and b and c all given or all None, got None for b"),
    (DGRAD, 2, 3, drop, ValueError, "a with b and c, got None"),
    (DGRAD, 2, 2, lambda y: y[:1], ValueError, r"y of dz's shape \(2, 4, 5, 5\), got shape \(1, 4, 5, 5\)"),
    (DGRAD, 2, 5, wider, ValueError, r"c of shape \(4,\), got shape \(5,\)"),
    (DGRAD, 0, 10, lambda _: torch.ones(6), ValueError, "scale and shift with slope, got None"),
    (DGRAD, 7, 10, elsewhere, ValueError, "slope on device cpu, got device meta"),
    (DGRAD, 4, 11, drop, ValueError, "mean and rstd all given or all None, got None for mean"),
    (DGRAD, 4, 12, wider, ValueError, r"rstd of shape \(6,\), got shape \(7,\)"),
    (DGRAD, 1, 13, lambda s: s[:1], ValueError, r"skip of x's shape \(2, 6, 5, 5\), got shape \(1, 6, 5, 5\)"),
    (DGRAD, 1, 14, lambda s: s[1:], ValueError, r"skip_sign of shape \(38,\), .*, got shape \(37,\)"),
    (DGRAD, 6, 13, lambda s: s[:1], ValueError, r"skip of x's shape \(2, 6, 5, 5\), got shape \(1, 6, 5, 5\)"),
    (DGRAD, 0, 11, lambda _: torch.ones(6), ValueError, "mean and rstd all given or all None, got None for rstd"),
    ("conv3x3_wgrad", 0, 14, lambda _: torch.int32, TypeError, "dtype floating, got torch.int32"),
    ("conv3x3_wgrad", 0, 10, lambda _: torch.ones(6), ValueError, "scale and shift with slope, got None"),
    ("conv3x3_bprop", 0, 19, lambda _: torch.int32, TypeError, "dtype floating, got torch.int32"),
    ("conv3x3_bprop", 6, 13, elsewhere, ValueError, "skip on x's device cpu, got device meta"),
    (END, 0, 0, lambda y: y[0], ValueError, "y of 4 dimensions"),
    (END, 0, 1, wider, ValueError, r"scale of shape \(3,\), got shape \(4,\)"),
    (END, 0, 1, drop, ValueError, "scale and shift all given or all None, got None for scale"),
    (END, 1, 3, lambda s: s[:1], ValueError, r"shortcut of y's shape \(2, 3, 5, 7\), got shape \(1, 3, 5, 7\)"),
    (END, 1, 3, elsewhere, ValueError, "shortcut on y's device cpu, got device meta"),
    (END, 2, 3, drop, ValueError, "shortcut with shortcut_scale, got None"),
    (END, 2, 4, drop, ValueError, "shortcut_scale and shortcut_shift all given or all None"),
    (END, EXCLUSIVE, 6, drop, ValueError, r"gate with mix \(0.0, 1.0, 1.0, -1.0\), got None"),
    (END, EXCLUSIVE, 7, lambda _: PLAIN, ValueError, r"gate None with mix \(1.0, 0.0, 1.0, 0.0\), got shape"),
    (END, EXCLUSIVE, 7, lambda mix: mix[:3], ValueError, r"mix of 4 weights \(branch, .*\), got \(0.0, 1.0, 1.0\)"),
    (END, EXCLUSIVE, 6, lambda g: g[0], ValueError, r"gate of 4 dimensions .*, got shape \(3, 5, 7\)"),
    (END, EXCLUSIVE, 6, lambda g: g.bool(), TypeError, "gate of dtype float32, .*, got torch.bool"),
    (END, EXCLUSIVE, 6, wider, ValueError, r"gate to broadcast against \(2, 3, 5, 7\), got shape \(2, 4, 5, 7\)"),
    (END, EXCLUSIVE, 6, elsewhere, ValueError, "gate on device cpu, got device meta"),
    (END, 1, 9, lambda _: False, ValueError, "mask False without relu or with slope, got True"),
    (END, 1, 10, lambda _: torch.ones(3), ValueError, "mask False without relu or with slope, got True"),
    (END, 1, 10, lambda _: torch.ones(4), ValueError, r"slope of shape \(3,\), got shape \(4,\)"),
    (BACK, 0, 0, lambda d: d[0], ValueError, "dout of 4 dimensions"),
    (BACK, 0, 0, lambda d: d[:1], ValueError, r"dout of y's shape \(2, 3, 5, 7\), got shape \(1, 3, 5, 7\)"),
    (BACK, 1, 1, lambda s: s[1:], ValueError, r"sign of shape \(27,\)"),
    (BACK, SLOPED, 1, lambda _: torch.ones(*SHAPE), ValueError, r"sign None with slope, got shape \(2, 3, 5, 7\)"),
    (BACK, 0, 3, drop, ValueError, "scale and shift all given or all None, got None for scale"),
    (BACK, 0, 5, drop, ValueError, "mean and rstd all given or all None, got None for mean"),
    (BACK, 0, 6, wider, ValueError, r"rstd of shape \(3,\), got shape \(4,\)"),
    (BACK, 1, 7, lambda s: s[:1], ValueError, "shortcut of y's shape"),
    (BACK, 2, 7, drop, ValueError, "shortcut with shortcut_scale, got None"),
    (BACK, 2, 8, drop, ValueError, "shortcut_scale and shortcut_shift all given or all None"),
    (BACK, 2, 10, drop, ValueError, "shortcut_mean and shortcut_rstd all given or all None"),
    (BACK, 2, 11, wider, ValueError, r"shortcut_rstd of shape \(3,\), got shape \(4,\)"),
    (BACK, 0, 12, lambda _: torch.ones(1, 1, 1, 1), ValueError, "gate None with mix"),
    (BACK, 0, 13, lambda _: [1.0], ValueError, r"mix of 4 weights .*, got \(1.0,\)"),
    (BACK, SLOPED, 15, wider, ValueError, r"slope of shape \(3,\), got shape \(4,\)"),
    (BACK, 0, 16, lambda _: True, ValueError, "shortcut with need_shortcut, got None"),
    (BACK, 0, 17, lambda _: True, ValueError, "gate with need_gate, got None"),
    ("bn_add_relu_mask", 0, 1, lambda s: s[1:], ValueError, r"sign of shape \(27,\)"),
    ("bn_add_relu_mask", 1, 1, lambda s: s[:1], ValueError, "sign of dz's shape"),
    ("bn_add_relu_reduce", 1, 6, drop, ValueError, "shortcut and shortcut_mean and shortcut_rstd all given"),
    ("bn_add_relu_reduce", 1, 4, wider, ValueError, r"rstd of shape \(3,\), got shape \(4,\)"),
    ("bn_add_relu_apply", 1, 4, drop, ValueError, "b and c all given or all None, got None for b"),
    ("bn_add_relu_apply", 1, 3, drop, ValueError, "a with b and c, got None"),
    ("bn_add_relu_apply", 1, 2, lambda y: y[:1], ValueError, "y of dz's shape"),
    ("bn_add_relu_apply", 2, 6, lambda s: s[:1], ValueError, "skip of dz's shape"),
    ("bn_add_relu_apply", 2, 7, lambda s: s[1:], ValueError, r"skip_sign of shape \(27,\)"),
    ("bn_add_relu_pool", 1, 0, lambda y: y[0], ValueError, "y of 4 dimensions"),
    ("bn_add_relu_pool", 1, 1, drop, ValueError, "scale and shift all given or all None, got None for scale"),
    ("bn_add_relu_pool", 1, 2, wider, ValueError, r"shift of shape \(3,\), got shape \(4,\)"),
    ("bn_add_relu_spread", 0, 0, lambda d: d.long(), TypeError, "dz of dtype float32, .*, got torch.int64"),
    ("bn_add_relu_spread", 0, 1, wider, ValueError, r"dpool of shape \(2, 3, 1, 1\), got shape \(2, 4, 1, 1\)"),
    ("bn_add_relu_spread", 0, 1, elsewhere, ValueError, "dpool on dz's device cpu, got device meta"),
    ("bn_statistics", 0, 0, lambda y: y[0], ValueError, "y of 4 dimensions"),
    ("bn_merge", 0, 0, lambda n: n.long(), TypeError, "count of dtype int32, got torch.int64"),
    ("bn_merge", 0, 0, lambda n: n[:2], ValueError, r"count of shape \(3,\), got shape \(2,\)"),
    ("bn_merge", 0, 2, lambda m: m[:2], ValueError, "m2 of mean's shape"),
    ("bn_finalize", 0, 1, lambda m: m.half(), ValueError, "mean of shape .* and dtype float32 or float64, got"),
    ("bn_finalize", 0, 3, wider, ValueError, r"weight of shape \(5,\), got shape \(6,\)"),
    ("bn_finalize", 0, 3, elsewhere, ValueError, "weight on mean's device cpu, got device meta"),
    ("bn_finalize", 0, 4, wider, ValueError, r"bias of shape \(5,\), got shape \(6,\)"),
    ("bn_finalize", 0, 5, lambda _: -1.0, ValueError, "eps >= 0, got -1.0"),
    ("bn_finalize", 0, 5, lambda _: math.nan, ValueError, "eps >= 0, got nan"),
    ("bn_coefficients", 0, 0, wider, ValueError, r"dbeta of shape \(5,\), got shape \(6,\)"),
    ("bn_coefficients", 0, 2, wider, ValueError, r"weight of shape \(5,\), got shape \(6,\)"),
    ("bn_coefficients", 0, 5, lambda n: n.long(), TypeError, "count of dtype int32, got torch.int64"),
    ("stem_forward", 0, 1, wider, ValueError, r"scale of shape \(3,\), got shape \(4,\)"),
    ("stem_infer", 0, 1, wider, ValueError, r"weight of shape \(K, 3, R, S\), got shape \(4, 4, 7, 7\)"),
    ("stem_infer", 0, 1, elsewhere, ValueError, "weight on x's device cpu, got device meta"),
    ("stem_infer", 0, 3, lambda _: 0, ValueError, "stride >= 1, got 0"),
    ("stem_infer", 0, 4, lambda _: -1, ValueError, "padding >= 0, got -1"),
    ("stem_reduce", 0, 0, wider, ValueError, r"dout of the pooled shape \(2, 3, 3, 4\), got shape \(2, 4, 3, 4\)"),
    ("stem_apply", 1, 5, drop, ValueError, "b and c all given or all None, got None for b"),
    ("stem_backward", 0, 6, wider, ValueError, r"weight of shape \(3,\), got shape \(4,\)"),
    ("stem_backward", 0, 7, lambda n: n.long(), TypeError, "count of dtype int32, got torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["eager", "fake"])
@pytest.mark.parametrize(
    ("name", "sample", "argument", "change", "error", "text"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_checks(name, sample, argument, change, error, text, how):
    """The same sentence whether the op runs or is only traced."""
    args = list(samples(name, Maker(torch.float32))[sample])
    args[argument] = change(args[argument])
    call = registered[name]
    if how == "fake":
        args, call = fake(args), call.overload
    with pytest.raises(error, match=f"{name}: expected {text}"):
        call(*args)


def test_the_dispatcher_reaches_the_same_checks():
    """``torch.ops.resnet_fused`` is no way around them."""
    with pytest.raises(ValueError, match="conv3x3_fprop: expected stride >= 1, got 0"):
        torch.ops.resnet_fused.conv3x3_fprop(
            torch.ones(1, 1, 3, 3), None, None, None, torch.ones(1, 1, 3, 3), 0, 1, 1, True
        )


def test_tolerances_are_a_few_roundings():
    """A tolerance that lets a wrong kernel through would make this file worthless."""
    assert all(TOLERANCE[dtype] <= max(300 * EPS[dtype], 1e-11) for dtype in TOLERANCE if dtype != torch.float64)
