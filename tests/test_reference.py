"""``reference.py`` against PyTorch's own operators and autograd, in fp64: no expected value comes from our own code."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS
from helpers import assert_close, error, is_channels_last, rand, randn
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from resnet_fused import reference

EXACT = 1e-12
convs = pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
activations = pytest.mark.parametrize("slope", [False, True], ids=["relu", "prelu"])
forms = pytest.mark.parametrize("deferred", [False, True], ids=["plain", "deferred"])


def operands(case):
    x, w = randn(case.n, case.c, case.h, case.w, seed=1), randn(*case.weight_shape, seed=2)
    return x, w, randn(case.c, seed=3), randn(case.c, seed=4)


def per_channel(v):
    return v.view(1, -1, 1, 1)


def act(z, slope):
    return F.relu(z) if slope is None else F.prelu(z, slope)


def slopes(size):
    """Of both signs, with a 0 and a 1."""
    slope = randn(size, seed=20)
    slope[0], slope[-1] = 0, 1
    slope[size // 2] = -0.7
    return slope


def conv2d(case, x, w):
    return F.conv2d(x, w, None, case.stride, case.padding, case.dilation, case.groups)


# --- convolution, forward -------------------------------------------------------------------------------------------


@convs
@forms
def test_conv_fprop(case, deferred):
    x, w, scale, shift = operands(case)
    y, count, mean, m2 = reference.conv_fprop(
        x, *((scale, shift) if deferred else (None, None)), None, w, *case.geometry, True
    )
    expected = conv2d(case, F.relu(x * per_channel(scale) + per_channel(shift)) if deferred else x, w)
    assert_close(y, expected, EXACT)
    assert is_channels_last(y)
    assert y.shape == case.output_shape
    m = expected.numel() // case.k
    assert count.tolist() == [m]
    assert count.dtype == torch.int32
    var, expected_mean = torch.var_mean(expected, (0, 2, 3), correction=0)
    assert_close(mean[0], expected_mean, 1e-10)
    assert_close(m2[0], var * m, 1e-10)


def test_conv_fprop_without_statistics():
    x, w, _, _ = operands(CONVS[3])
    _, count, mean, m2 = reference.conv_fprop(x, None, None, None, w, 1, 1, 1, False)
    assert (count.shape, mean.shape, m2.shape) == ((0,), (0, CONVS[3].k), (0, CONVS[3].k))


def test_the_border_of_a_deferred_input_is_zero_after_the_activation():
    """With scale 0 and shift 1 the activation is 1 inside and 0 outside; padding before it would give 9 everywhere."""
    x, one = randn(1, 1, 4, 5), torch.ones(1, dtype=torch.float64)
    y, *_ = reference.conv_fprop(x, 0 * one, one, None, torch.ones(1, 1, 3, 3, dtype=torch.float64), 1, 1, 1, False)
    rows, columns = torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 2])
    assert torch.equal(y[0, 0], torch.outer(rows, columns).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_are_those_of_the_rounded_output(dtype):
    x, w = randn(2, 8, 6, 6, dtype=dtype), randn(4, 8, 3, 3, seed=1, dtype=dtype)
    y, _, mean, m2 = reference.conv_fprop(x, None, None, None, w, 1, 1, 1, True)
    assert y.dtype == dtype
    assert mean.dtype == m2.dtype == torch.float32
    var, expected = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_close(mean[0], expected, 1e-6)
    assert_close(m2[0], var * (y.numel() // 4), 1e-6)


def test_operands_are_rounded_where_a_kernel_rounds_them():
    """The activation is rounded to the tensor's dtype, the output once; products and sums are fp32 at least."""
    x, w = randn(2, 64, 3, 3, dtype=torch.bfloat16), randn(8, 64, 1, 1, seed=1, dtype=torch.bfloat16)
    scale, shift = rand(64, dtype=torch.float32), randn(64, dtype=torch.float32)
    y, *_ = reference.conv_fprop(x, scale, shift, None, w, 1, 1, 1, False)
    act = F.relu(x.float() * per_channel(scale) + per_channel(shift))
    rounded, unrounded = (F.conv2d(a.double(), w.double()).bfloat16() for a in (act.bfloat16(), act))
    assert (y == rounded).float().mean() > 0.99
    assert (y == unrounded).float().mean() < 0.9


@convs
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_conv_infer(case, relu, with_residual):
    x, w, _, _ = operands(case)
    bias = randn(case.k, seed=7)
    residual = randn(*case.output_shape, seed=8) if with_residual else None
    expected = F.conv2d(x, w, bias, case.stride, case.padding, case.dilation, case.groups)
    expected = expected + residual if with_residual else expected
    y = reference.conv_infer(x, None, None, None, w, bias, residual, *case.geometry, relu, None)
    assert_close(y, F.relu(expected) if relu else expected, EXACT)
    assert is_channels_last(y)
    slope = randn(case.k, seed=9)
    y = reference.conv_infer(x, None, None, None, w, bias, residual, *case.geometry, False, slope)
    assert_close(y, F.prelu(expected, slope), EXACT)


@convs
@activations
def test_the_activation_of_a_deferred_input(case, slope):
    """fprop and infer read ``relu(bn(x))`` or ``prelu(bn(x))``, padded afterwards."""
    x, w, scale, shift = operands(case)
    slope = slopes(case.c) if slope else None
    expected = conv2d(case, act(x * per_channel(scale) + per_channel(shift), slope), w)
    y, *_ = reference.conv_fprop(x, scale, shift, slope, w, *case.geometry, False)
    assert_close(y, expected, EXACT)
    bias, residual = randn(case.k, seed=7), randn(*case.output_shape, seed=8)
    y = reference.conv_infer(x, scale, shift, slope, w, bias, residual, *case.geometry, True, None)
    assert_close(y, F.relu(expected + per_channel(bias) + residual), EXACT)


# --- convolution, backward ------------------------------------------------------------------------------------------


@convs
@forms
@pytest.mark.parametrize("statistics", ["batch", "frozen"])
@pytest.mark.parametrize("sign", [None, "bits", "values"])
def test_conv_backward(case, deferred, statistics, sign):
    """conv -> batch norm -> ReLU (unless sign is None), differentiated by autograd; so are the norm's sums."""
    x, w, scale, shift = operands(case)
    z = x * per_channel(scale) + per_channel(shift) if deferred else x
    z.requires_grad_()
    w.requires_grad_()
    y = conv2d(case, F.relu(z) if deferred else z, w)
    m = y.numel() // case.k
    if m == 1 and statistics == "batch":
        pytest.skip("one value per channel")
    gamma, beta = randn(case.k, seed=5).requires_grad_(), randn(case.k, seed=6).requires_grad_()
    running = (randn(case.k, seed=7), rand(case.k, seed=8))
    eps = 1e-3
    frozen = statistics == "frozen"
    out = F.batch_norm(y, *(running if frozen else (None, None)), gamma, beta, not frozen, 0.0, eps)
    dz = randn(*case.output_shape, seed=9)
    (out if sign is None else F.relu(out)).backward(dz)

    var, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
    rstd = (running[1] if frozen else var).add(eps).rsqrt()
    if frozen:
        a, b, c, read = gamma.detach() * rstd, None, None, None
    else:
        a, b, c = reference.bn_coefficients(beta.grad, gamma.grad, gamma.detach(), mean, rstd, torch.tensor([m]))
        read = y.detach()
    mask = {None: None, "bits": reference.pack_mask(out.detach() > 0), "values": F.relu(out.detach())}[sign]
    grad = (dz, mask, read, a, b, c)
    previous = (scale, shift, None) if deferred else (None, None, None)
    statistics_below = (randn(case.c, seed=10), rand(case.c, seed=11)) if deferred else (None, None)
    no_skip = (None, None, 1.0)

    dx, dbeta, dgamma, dslope = reference.conv_dgrad(
        *grad, w.detach(), x.detach(), *previous, *statistics_below, *no_skip, *case.geometry
    )
    assert_close(dx, z.grad, 1e-10, "dx")
    assert is_channels_last(dx)
    assert dslope.numel() == 0
    if deferred:
        assert_sums(dbeta, dgamma, z.grad, x, *statistics_below)
    else:
        assert dbeta.numel() == dgamma.numel() == 0
    dw = reference.conv_wgrad(*grad, w.detach(), x.detach(), *previous, *case.geometry, torch.float64)
    assert_close(dw, w.grad, 1e-10, "dw")

    both = reference.conv_bprop(
        *grad, w.detach(), x.detach(), *previous, *statistics_below, *no_skip, *case.geometry, torch.float64
    )
    assert all(torch.equal(one, other) for one, other in zip(both, (dx, dbeta, dgamma, dslope, dw), strict=True))


def assert_sums(dbeta, dgamma, dz, y, mean, rstd):
    """``sum dz`` and ``sum dz * xhat``, which may cancel."""
    xhat = (y.detach() - per_channel(mean)) * per_channel(rstd)
    tolerance = 1e-12 * dz.abs().sum()
    assert (dbeta - dz.sum((0, 2, 3))).abs().max() <= tolerance
    assert (dgamma - (dz * xhat).sum((0, 2, 3))).abs().max() <= 10 * tolerance


@pytest.mark.parametrize("sign", [None, "bits", "values"])
@pytest.mark.parametrize("skip_scale", [1.0, -0.3])
def test_conv_dgrad_adds_the_masked_skip_gradient(sign, skip_scale):
    case = CONVS[3]
    x, w, _, _ = operands(case)
    x.requires_grad_()
    other, dz, skip = randn(*x.shape, seed=5), randn(*case.output_shape, seed=6), randn(*x.shape, seed=7)
    shortcut = x if sign is None else F.relu(x + other)
    torch.autograd.backward([conv2d(case, x, w), skip_scale * shortcut], [dz, skip])
    mask = {None: None, "bits": reference.pack_mask(shortcut.detach() > 0), "values": shortcut.detach()}[sign]
    dx, *_ = reference.conv_dgrad(dz, *[None] * 5, w, x.detach(), *[None] * 5, skip, mask, skip_scale, *case.geometry)
    assert_close(dx, x.grad, EXACT)


@convs
@activations
@pytest.mark.parametrize("sign", [None, "bits", "values"])
def test_conv_backward_through_the_activation_with_a_skip_gradient(case, slope, sign):
    """Two readers of one deferred tensor: the convolution, and whoever sends the skip gradient."""
    x, w, scale, shift = operands(case)
    slope = slopes(case.c).requires_grad_() if slope else None
    z = (x * per_channel(scale) + per_channel(shift)).requires_grad_()
    w.requires_grad_()
    a = act(z, slope)
    other = randn(*x.shape, seed=5)
    reader = a if sign is None else F.relu(a + other)
    dz, skip = randn(*case.output_shape, seed=6), randn(*x.shape, seed=7)
    torch.autograd.backward([conv2d(case, a, w), 0.5 * reader], [dz, skip])
    mask = {None: None, "bits": reference.pack_mask(reader.detach() > 0), "values": reader.detach()}[sign]

    norm = randn(case.c, seed=10), rand(case.c, seed=11)
    given = None if slope is None else slope.detach()
    dx, dbeta, dgamma, dslope, dw = reference.conv_bprop(
        dz, *[None] * 5, w.detach(), x, scale, shift, given, *norm, skip, mask, 0.5, *case.geometry, torch.float64
    )
    assert_close(dx, z.grad, 1e-11, "dx")
    assert_close(dw, w.grad, 1e-11, "dw")
    assert_sums(dbeta, dgamma, z.grad, x, *norm)
    if slope is None:
        assert dslope.numel() == 0
    else:
        assert (dslope - slope.grad).abs().max() <= 1e-12 * x.numel()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_weight_gradient_has_the_strides_of_the_weight_and_the_dtype_asked_for(layout):
    x, w = randn(2, 4, 5, 5, dtype=torch.bfloat16), randn(6, 4, 3, 3, dtype=torch.bfloat16).to(memory_format=layout)
    dz = randn(2, 6, 5, 5, dtype=torch.bfloat16)
    dw = reference.conv_wgrad(dz, *[None] * 5, w, x, None, None, None, 1, 1, 1, torch.float32)
    assert dw.dtype == torch.float32
    assert dw.stride() == w.stride()


# --- batch norm -----------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    channels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_bn_merge_of_tiles_is_the_whole(counts, channels, seed):
    """Tiles of any size; what stands in an empty tile is never read."""
    values = randn(sum(counts), channels, seed=seed) * 3 + 7
    mean, m2 = (torch.full((len(counts), channels), float("nan"), dtype=torch.float64) for _ in range(2))
    for i, tile in enumerate(values.split(counts)):
        if len(tile):
            mean[i] = tile.mean(0)
            m2[i] = (tile - tile.mean(0)).square().sum(0)
    count, merged, deviation = reference.bn_merge(torch.tensor(counts, dtype=torch.int32), mean, m2)
    assert count.tolist() == [len(values)]
    assert_close(merged[0], values.mean(0), 1e-12)
    assert (deviation[0] - values.var(0, correction=0) * len(values)).abs().max() < 1e-10


def test_bn_merge_of_nothing_is_nothing():
    tiles = torch.zeros(2, dtype=torch.int32), torch.full((2, 3), float("nan")), torch.full((2, 3), float("nan"))
    count, mean, m2 = reference.bn_merge(*tiles)
    assert count.tolist() == [0]
    assert torch.equal(mean, torch.zeros(1, 3))
    assert torch.equal(m2, torch.zeros(1, 3))


@pytest.mark.parametrize("affine", ["weight-bias", "weight", "bias", "none"])
def test_bn_finalize(affine):
    y = randn(4, 5, 3, 2) * 2 + 3
    weight = randn(5, seed=1) if "weight" in affine else None
    bias = randn(5, seed=2) if "bias" in affine else None
    running_mean, running_var = torch.zeros(5).double(), torch.ones(5).double()
    expected = F.batch_norm(y, running_mean, running_var, weight, bias, True, 1.0, 1e-2)
    scale, shift, mean, rstd, var = reference.bn_finalize(*reference.bn_statistics(y), weight, bias, 1e-2)
    assert_close(y * per_channel(scale) + per_channel(shift), expected, EXACT)
    assert_close(mean, running_mean, EXACT)
    assert_close(var, running_var, EXACT)
    assert_close(rstd, (y.var((0, 2, 3), correction=0) + 1e-2).rsqrt(), EXACT)


@pytest.mark.parametrize("gamma", ["none", "random", "zero"])
def test_bn_coefficients(gamma):
    """``a * dz + b * y + c`` is autograd's gradient of batch norm's input, also for gamma 0 (zero-initialised)."""
    y, dz = (randn(3, 4, 5, 2) * 2 + 1).requires_grad_(), randn(3, 4, 5, 2, seed=1)
    weight = {"none": None, "random": randn(4, seed=2), "zero": torch.zeros(4).double()}[gamma]
    F.batch_norm(y, None, None, weight, None, True, 0.0, 1e-5).backward(dz)
    var, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
    rstd = (var + 1e-5).rsqrt()
    dbeta, dgamma = reference.bn_sums(dz, y.detach(), mean, rstd)
    a, b, c = reference.bn_coefficients(dbeta, dgamma, weight, mean, rstd, torch.tensor([10, 20], dtype=torch.int32))
    dy = per_channel(a) * dz + per_channel(b) * y.detach() + per_channel(c)
    assert (dy - y.grad).abs().max() < 1e-12


def test_bn_sums_are_the_gradients_of_weight_and_bias():
    y, dz = randn(3, 4, 5, 2) * 2 + 1, randn(3, 4, 5, 2, seed=1)
    weight, bias = torch.zeros(4).double().requires_grad_(), torch.zeros(4).double().requires_grad_()
    F.batch_norm(y, None, None, weight, bias, True, 0.0, 1e-5).backward(dz)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    dbeta, dgamma = reference.bn_sums(dz, y, mean, (var + 1e-5).rsqrt())
    assert_close(dbeta, bias.grad, EXACT)
    assert_close(dgamma, weight.grad, EXACT)


def test_a_large_mean_does_not_drown_the_variance():
    """Mean 1e4 deviations from 0: in fp32 E[x^2] - E[x]^2 has no right digit."""
    y = (randn(4, 3, 16, 16) + 1e4).float()
    exact = y.double().var((0, 2, 3), correction=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert error(naive, exact) > 0.1
    count, mean, m2 = reference.bn_statistics(y)
    assert_close(m2[0] / count, exact, 1e-5)
    halves = [reference.bn_statistics(half) for half in y.split([1, 3])]
    _, _, merged = reference.bn_merge(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
    assert_close(merged[0] / count, exact, 1e-3)  # the tiles' means have 24 bits, half of which the mean takes
    *_, rstd, var = reference.bn_finalize(count, mean, m2, None, None, 0.0)
    assert_close(rstd, exact.rsqrt(), 1e-5)
    assert_close(var, y.double().var((0, 2, 3)), 1e-5)


def test_statistics_of_an_empty_tensor():
    count, mean, m2 = reference.bn_statistics(torch.empty(0, 3, 4, 4))
    assert count.tolist() == [0]
    assert torch.equal(mean, torch.zeros(1, 3))
    assert torch.equal(m2, torch.zeros(1, 3))


NO_SKIP = (None, None, 1.0)
PLAIN = (1.0, 0.0, 1.0, 0.0)

# --- block end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["none", "plain", "deferred"])
@pytest.mark.parametrize("sign", ["bits", "values"])
def test_bn_add_relu(shortcut, sign):
    """Forward, mask, reduce and apply against autograd through PyTorch's batch norm, with one gamma of 0."""
    shape, eps = (2, 3, 5, 3), 1e-3
    y, s = (randn(*shape, seed=1) * 2 + 1).requires_grad_(), randn(*shape, seed=2).requires_grad_()
    gammas = [randn(3, seed=3), randn(3, seed=4)]
    gammas[0][1] = 0
    gammas = [g.requires_grad_() for g in gammas]
    betas = [randn(3, seed=5).requires_grad_(), randn(3, seed=6).requires_grad_()]
    total = F.batch_norm(y, None, None, gammas[0], betas[0], True, 0.0, eps)
    if shortcut == "plain":
        total = total + s
    elif shortcut == "deferred":
        total = total + F.batch_norm(s, None, None, gammas[1], betas[1], True, 0.0, eps)
    expected, dout = F.relu(total), randn(*shape, seed=7)
    expected.backward(dout)

    def norm(v, i):
        return reference.bn_finalize(*reference.bn_statistics(v), gammas[i].detach(), betas[i].detach(), eps)

    yd, sd, deferred = y.detach(), s.detach(), shortcut == "deferred"
    scale, shift, mean, rstd, _ = norm(yd, 0)
    s_scale, s_shift, s_mean, s_rstd, _ = norm(sd, 1)
    added = (None if shortcut == "none" else sd, *((s_scale, s_shift) if deferred else (None, None)))
    out, bits, *_ = reference.bn_add_relu_forward(yd, scale, shift, *added, None, PLAIN, False, True, None, True, False)
    assert_close(out, expected.detach(), EXACT)
    assert is_channels_last(out)
    assert torch.equal(reference.unpack_mask(bits, out), expected > 0)
    mask = bits if sign == "bits" else out

    dz = reference.bn_add_relu_mask(dout, mask)
    assert torch.equal(dz, torch.where(expected > 0, dout, 0.0))
    if shortcut == "plain":
        assert torch.equal(dz, s.grad)
    other = (sd, s_mean, s_rstd) if deferred else (None, None, None)
    dbeta, dgamma, s_dgamma = reference.bn_add_relu_reduce(dout, mask, yd, mean, rstd, *other)
    assert_close(dbeta, betas[0].grad, 1e-11)
    assert_close(dgamma, gammas[0].grad, 1e-11)
    count = torch.tensor([yd.numel() // 3])
    dy = reference.bn_add_relu_apply(
        dout, mask, yd, *reference.bn_coefficients(dbeta, dgamma, gammas[0].detach(), mean, rstd, count), *NO_SKIP
    )
    assert_close(dy, y.grad, 1e-10)
    if deferred:
        assert_close(dbeta, betas[1].grad, 1e-11)
        assert_close(s_dgamma, gammas[1].grad, 1e-11)
        ds = reference.bn_add_relu_apply(
            dout,
            mask,
            sd,
            *reference.bn_coefficients(dbeta, s_dgamma, gammas[1].detach(), s_mean, s_rstd, count),
            *NO_SKIP,
        )
        assert_close(ds, s.grad, 1e-10)


def test_bn_add_relu_apply_with_frozen_statistics():
    y, dz, scale = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1), randn(3, seed=2)
    F.relu(y * per_channel(scale)).backward(dz)
    out = F.relu(y.detach() * per_channel(scale))
    assert_close(reference.bn_add_relu_apply(dz, out, y.detach(), scale, None, None, *NO_SKIP), y.grad, EXACT)


SHAPE = (2, 3, 5, 4)
GATES = ((2, 3, 5, 4), (2, 1, 1, 1), (2, 3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1), None)
MIXES = (
    PLAIN,
    (0.5, 0.0, -0.3, 0.0),  # constant scaling
    (0.0, 1.0, 1.0, -1.0),  # exclusive gating
    (1.0, 0.0, 1.0, -1.0),  # shortcut gating
    (0.0, 1.0, 1.0, 0.0),  # stochastic depth, squeeze-and-excitation
    (1.0, 0.0, 0.0, 1.0),  # dropout
    (1.0, 0.0, 0.0, 0.0),  # no shortcut
    (0.4, -1.5, 2.0, 0.25),
)
PAIRS = [(gate, mix) for mix in MIXES for gate in GATES if (gate is None) == (mix[1] == mix[3] == 0)]


@pytest.mark.parametrize(("gate", "mix"), PAIRS, ids=str)
@pytest.mark.parametrize("shortcut", ["none", "plain", "deferred"])
@pytest.mark.parametrize("end", ["relu", "linear", "prelu"])
@pytest.mark.parametrize("branch", ["norm", "plain", "norm-relu", "relu"])
def test_the_weighed_sum(gate, mix, shortcut, end, branch):
    """Every form of the block's end, forward and backward, against autograd of the formula in PyTorch's operators."""
    y, s, dout = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), randn(*SHAPE, seed=3)
    norm, s_norm = [randn(3, seed=4 + i) for i in range(4)], [randn(3, seed=8 + i) for i in range(4)]
    gate = None if gate is None else randn(*gate, seed=12).requires_grad_()
    slope = slopes(3).requires_grad_() if end == "prelu" else None
    normed, s_normed, branch_relu = "norm" in branch, shortcut == "deferred", "relu" in branch

    z = y * per_channel(norm[0]) + per_channel(norm[1]) if normed else y.clone()
    z_s = s * per_channel(s_norm[0]) + per_channel(s_norm[1]) if s_normed else s.clone()
    z.requires_grad_()
    z_s.requires_grad_()
    f = F.relu(z) if branch_relu else z
    total = f * mix[0]
    if mix[1]:
        total = total + mix[1] * (gate * f)
    if shortcut != "none":
        total = total + mix[2] * z_s
        if mix[3]:
            total = total + mix[3] * (gate * z_s)
    expected = {"relu": F.relu, "linear": lambda t: t, "prelu": lambda t: F.prelu(t, slope)}[end](total)
    leaves = [t for t in (z, z_s, gate, slope) if t is not None]
    found = torch.autograd.grad(expected, leaves, dout, allow_unused=True)
    by_leaf = {id(leaf): torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)}

    affine = (norm[0], norm[1]) if normed else (None, None)
    added = (None, None, None) if shortcut == "none" else (s, *(s_norm[:2] if s_normed else (None, None)))
    g, slope_ = (None if t is None else t.detach() for t in (gate, slope))
    relu = end == "relu"
    out, bits, counts, mean, m2 = reference.bn_add_relu_forward(
        y, *affine, *added, g, mix, branch_relu, relu, slope_, relu, True
    )
    assert_close(out, expected.detach(), EXACT)
    assert is_channels_last(out)
    assert torch.equal(reference.unpack_mask(bits, out), expected > 0) if relu else bits.numel() == 0
    var, expected_mean = torch.var_mean(expected.detach(), (0, 2, 3), correction=0)
    assert counts.tolist() == [out.numel() // 3]
    assert_close(mean[0], expected_mean, 1e-11)
    assert_close(m2[0], var * counts, 1e-11)

    for sign in (bits, out) if relu else (None,):
        sums, s_sums = (norm[2:] if normed else (None, None)), (s_norm[2:] if s_normed else (None, None))
        dz, ds, dbeta, dgamma, s_dbeta, s_dgamma, dgate, dslope = reference.bn_add_relu_backward(
            dout, sign, y, *affine, *sums, *added, *s_sums, g, mix, branch_relu, slope_,
            shortcut != "none", gate is not None,
        )  # fmt: skip
        assert_close(dz, by_leaf[id(z)], 1e-11, "dz")
        assert is_channels_last(dz)
        if normed:
            assert_sums(dbeta, dgamma, by_leaf[id(z)], y, *norm[2:])
        else:
            assert dbeta.numel() == dgamma.numel() == 0
        if shortcut != "none":
            assert (ds - by_leaf[id(z_s)]).abs().max() < 1e-12
            assert is_channels_last(ds)
        else:
            assert ds.numel() == 0
        if s_normed:
            assert_sums(s_dbeta, s_dgamma, by_leaf[id(z_s)], s, *s_norm[2:])
        else:
            assert s_dbeta.numel() == s_dgamma.numel() == 0
        for t, leaf in ((dgate, gate), (dslope, slope)):
            if leaf is None:
                assert t.numel() == 0
            else:
                assert t.shape == leaf.shape
                assert (t - by_leaf[id(leaf)]).abs().max() < 1e-11


def test_sums_of_a_shortcut_whose_gradient_nobody_wants():
    y, s, dout = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), randn(*SHAPE, seed=3)
    scale, shift, mean, rstd = (randn(3, seed=4 + i) for i in range(4))
    args = (dout, None, y, None, None, None, None, s, scale, shift, mean, rstd, None, (1.0, 0.0, 0.5, 0.0), False, None)
    _, ds, _, _, dbeta, dgamma, *_ = reference.bn_add_relu_backward(*args, False, False)
    assert ds.numel() == 0
    assert_sums(dbeta, dgamma, 0.5 * dout, s, mean, rstd)


def test_no_result_of_the_block_end_is_an_argument():
    """What nothing changes is copied: autograd owns the one, the caller the other."""
    y, dout = (t.to(memory_format=torch.channels_last) for t in (randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)))
    none = (None, None)
    out, *_ = reference.bn_add_relu_forward(y, *none, None, *none, None, PLAIN, False, False, None, False, False)
    dz, ds, *_ = reference.bn_add_relu_backward(
        dout, None, y, *none, *none, y, *none, *none, None, PLAIN, False, None, True, False
    )
    dy = reference.bn_add_relu_apply(dout, None, y, None, None, None, *NO_SKIP)
    assert len({t.data_ptr() for t in (y, dout, out, dz, ds, dy)}) == 6
    assert torch.equal(out, y)
    assert all(torch.equal(t, dout) for t in (dz, ds, dy))


@pytest.mark.parametrize("sign", [None, "bits", "values"])
@pytest.mark.parametrize("form", ["batch", "frozen", "plain"])
def test_bn_add_relu_apply_adds_a_skip_gradient(sign, form):
    """A tensor read by a norm (or directly) and, through a ReLU or not, by somebody else."""
    y = (randn(*SHAPE, seed=1) * 2 + 1).requires_grad_()
    dz, skip, other = randn(*SHAPE, seed=2), randn(*SHAPE, seed=3), randn(*SHAPE, seed=4)
    gamma, running, eps = randn(3, seed=5), (randn(3, seed=6), rand(3, seed=7)), 1e-3
    statistics = running if form == "frozen" else (None, None)
    first = y if form == "plain" else F.batch_norm(y, *statistics, gamma, None, form == "batch", 0.0, eps)
    reader = y if sign is None else F.relu(y + other)
    torch.autograd.backward([first, -0.7 * reader], [dz, skip])
    mask = {None: None, "bits": reference.pack_mask(reader.detach() > 0), "values": reader.detach()}[sign]

    yd, a, b, c = y.detach(), None, None, None
    if form == "frozen":
        a = gamma * (running[1] + eps).rsqrt()
    elif form == "batch":
        var, mean = torch.var_mean(yd, (0, 2, 3), correction=0)
        rstd = (var + eps).rsqrt()
        sums = reference.bn_sums(dz, yd, mean, rstd)
        a, b, c = reference.bn_coefficients(*sums, gamma, mean, rstd, torch.tensor([yd.numel() // 3]))
    dy = reference.bn_add_relu_apply(dz, None, yd, a, b, c, skip, mask, -0.7)
    assert_close(dy, y.grad, 1e-11)
    assert is_channels_last(dy)


@pytest.mark.parametrize("deferred", [False, True], ids=["plain", "norm"])
def test_pool_and_spread_are_each_others_gradient(deferred):
    y, scale, shift = randn(*SHAPE, seed=1), randn(3, seed=2), randn(3, seed=3)
    z = (y * per_channel(scale) + per_channel(shift) if deferred else y.clone()).requires_grad_()
    expected, dz, dpool = F.adaptive_avg_pool2d(z, 1), randn(*SHAPE, seed=4), randn(2, 3, 1, 1, seed=5)
    torch.autograd.backward([expected, z], [dpool, dz])
    pooled = reference.bn_add_relu_pool(y, *((scale, shift) if deferred else (None, None)))
    assert_close(pooled, expected.detach(), EXACT)
    spread = reference.bn_add_relu_spread(dz, dpool)
    assert_close(spread, z.grad, EXACT)
    assert is_channels_last(pooled)
    assert is_channels_last(spread)


# --- masks and the semantics of ReLU --------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 99)
)
def test_mask_bits(shape, seed):
    """Bit ``i`` of byte ``j`` is element ``8 * j + i`` in NHWC order; the last byte is filled with zeros."""
    positive = randn(*shape, seed=seed) > 0
    bits = reference.pack_mask(positive)
    flat = positive.permute(0, 2, 3, 1).flatten().tolist()
    expected = [sum(bit << i for i, bit in enumerate(flat[j : j + 8])) for j in range(0, len(flat), 8)]
    assert bits.tolist() == expected
    assert bits.dtype == torch.uint8
    assert torch.equal(reference.unpack_mask(bits, positive), positive)


def test_relu_passes_as_pytorchs_does():
    """Gradient 0 at 0 and -0, 1 at NaN; NaN propagates."""
    z = torch.tensor([1.0, 0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), 5e-324]).double()
    leaf = z.clone().requires_grad_()
    value = F.relu(leaf)
    value.backward(torch.ones_like(z))
    y, one, zero = z.view(1, 1, 2, 4), torch.ones(1).double(), torch.zeros(1).double()
    assert torch.equal(reference.activation(y, one, zero).flatten().isnan(), value.isnan())
    terms = (y, one, zero, None, None, None)
    out, bits, *_ = reference.bn_add_relu_forward(*terms, None, PLAIN, False, True, None, True, False)
    torch.testing.assert_close(out.flatten(), value.detach(), rtol=0, atol=0, equal_nan=True)
    dout = torch.ones_like(y)
    for sign in (bits, out):
        assert torch.equal(reference.masked(dout, sign).flatten(), leaf.grad)
    w = torch.ones(1, 1, 1, 1).double()
    dx, *_ = reference.conv_dgrad(dout, *[None] * 5, w, y, one, zero, *[None] * 5, 1.0, 1, 1, 1)
    assert torch.equal(dx.flatten(), leaf.grad)


def test_prelu_passes_as_pytorchs_does():
    """At 0 and -0 the slope's side; NaN stays NaN and takes the slope; a slope of 0 or below changes neither."""
    values = torch.tensor([1.0, 0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), 5e-324]).double()
    for number in (0.25, 0.0, -2.0):
        slope = torch.full((1,), number, dtype=torch.float64, requires_grad=True)
        leaf = values.view(1, 1, 2, 4).clone().requires_grad_()
        expected = F.prelu(leaf, slope)
        expected.backward(torch.ones_like(leaf))
        y, one, zero, s = leaf.detach(), torch.ones(1).double(), torch.zeros(1).double(), slope.detach()
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(reference.activation(y, one, zero, s), expected.detach(), **same)
        terms = (y, one, zero, None, None, None, None, PLAIN, False)
        out, *_ = reference.bn_add_relu_forward(*terms, False, s, False, False)
        torch.testing.assert_close(out, expected.detach(), **same)
        dout = torch.ones_like(y)
        back = (dout, None, y, one, zero, None, None, None, None, None, None, None, None, PLAIN, False, s, False, False)
        dz, *_, dslope = reference.bn_add_relu_backward(*back)
        torch.testing.assert_close(dz, leaf.grad, **same)
        torch.testing.assert_close(dslope, slope.grad, **same)
        w = torch.ones(1, 1, 1, 1).double()
        dx, _, _, dslope = reference.conv_dgrad(dout, *[None] * 5, w, y, one, zero, s, *[None] * 4, 1.0, 1, 1, 1)
        torch.testing.assert_close(dx, leaf.grad, **same)
        torch.testing.assert_close(dslope, slope.grad, **same)


def test_a_masked_nan_gradient_is_zero():
    """As threshold_backward: what the ReLU stopped is 0 whatever arrives."""
    dz, out = torch.full((1, 1, 1, 2), float("nan")), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    found = reference.masked(dz, out).flatten()
    assert found[0] == 0
    assert found[1].isnan()


# --- stem -----------------------------------------------------------------------------------------------------------


def stem_case(kind):
    """The stem convolution's output: generic values, or few different ones so that windows tie."""
    shape = {"even": (2, 3, 8, 6), "odd": (2, 3, 7, 5), "tiny": (3, 2, 1, 2)}.get(kind, (2, 3, 7, 6))
    y = randn(*shape, seed=1)
    return y.round() if kind == "ties" else y


@pytest.mark.parametrize("kind", ["even", "odd", "tiny", "ties"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_stem(kind, frozen, affine):
    y = stem_case(kind).requires_grad_()
    c, eps = y.shape[1], 1e-3
    weight = randn(c, seed=2).requires_grad_() if affine else None
    bias = randn(c, seed=3).requires_grad_() if affine else None
    running = (randn(c, seed=4), rand(c, seed=5)) if frozen else (None, None)
    expected = F.max_pool2d(F.relu(F.batch_norm(y, *running, weight, bias, not frozen, 0.0, eps)), 3, 2, 1)
    dout = randn(*expected.shape, seed=6)
    expected.backward(dout)

    yd = y.detach()
    var, mean = (running[1], running[0]) if frozen else torch.var_mean(yd, (0, 2, 3), correction=0)
    rstd = (var + eps).rsqrt()
    gamma = weight.detach() if affine else torch.ones(c).double()
    scale = gamma * rstd
    shift = (bias.detach() if affine else 0) - mean * scale
    out = reference.stem_forward(yd, scale, shift)
    assert_close(out, expected.detach(), EXACT)
    assert is_channels_last(out)

    count = None if frozen else torch.tensor([yd.numel() // c], dtype=torch.int32)
    dy, dbeta, dgamma = reference.stem_backward(
        dout, yd, scale, shift, mean, rstd, weight.detach() if affine else None, count
    )
    assert_close(dy, y.grad, 1e-10)
    assert is_channels_last(dy)
    if affine:
        assert_close(dbeta, bias.grad, 1e-11)
        assert_close(dgamma, weight.grad, 1e-11)
    sums = reference.stem_reduce(dout, yd, scale, shift, mean, rstd)
    assert torch.equal(sums[0], dbeta)
    assert torch.equal(sums[1], dgamma)
    a, b, c_ = (scale, None, None) if frozen else reference.bn_coefficients(*sums, gamma, mean, rstd, count)
    assert_close(reference.stem_apply(dout, yd, scale, shift, a, b, c_), dy, EXACT)


def test_stem_with_nan():
    """A NaN wins its windows and takes their gradient, as in PyTorch."""
    y = randn(1, 1, 6, 6)
    y[0, 0, 2, 3] = float("nan")
    y.requires_grad_()
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    expected = F.max_pool2d(F.relu(y), 3, 2, 1)
    dout = rand(*expected.shape, seed=1)
    expected.backward(dout)
    out = reference.stem_forward(y.detach(), one, zero)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected.isnan().any()
    torch.testing.assert_close(reference.stem_gradient(dout, y.detach(), one, zero), y.grad, equal_nan=True)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 3), (2, 0)])
def test_stem_infer(stride, padding):
    x, w, bias = randn(2, 3, 11, 9), randn(4, 3, 7, 7, seed=1), randn(4, seed=2)
    expected = F.max_pool2d(F.relu(F.conv2d(x, w, bias, stride, padding)), 3, 2, 1)
    out = reference.stem_infer(x, w, bias, stride, padding)
    assert_close(out, expected, EXACT)
    assert is_channels_last(out)
