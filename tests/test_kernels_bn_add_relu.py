"""The Triton kernels of the block's end: every form, odd shapes, several programs on several tiles, both walks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import dtype_id
from kernel_helpers import DEVICE, DTYPES, compare, maker, outputs, run
from test_ops import MIXES, PLAIN, Maker
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.kernels import module_of
from resnet_fused.kernels._launch import recording
from resnet_fused.kernels.bn_add_relu_walk import walk
from resnet_fused.ops._op import ops as registered
from resnet_fused.tuning import RowsConfig, use

pytest.importorskip("triton", reason="the kernels are written in Triton")

NONE = (None, None)
# Images, channels, height, width, and what it is for.
SHAPES = (
    (2, 24, 3, 5),  # channels that fill no tile, a last tile of few rows
    (3, 64, 3, 3),  # images that no tile ends with
    (1, 8, 1, 1),  # one row
    (2, 72, 1, 1),  # images of one pixel, two blocks of channels
)
# Tiles of 8 rows and at most 64 channels: each of a few programs walks over several of them.
SMALL = (RowsConfig(8, 64, 4, 1), RowsConfig(16, 16, 1, 2), RowsConfig(4, 32, 4, 0), RowsConfig(32, 256, 4, 1))
CONFIGS = [None, *SMALL]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def gates(m: Maker, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Every combination of full sizes and ones that differs."""
    seen = set()
    for full in itertools.product((True, False), repeat=4):
        gate = tuple(size if f else 1 for size, f in zip(shape, full, strict=True))
        if gate not in seen:
            seen.add(gate)
            yield m.activation(*gate)


def summands(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    """``y, scale, shift, shortcut, scale, shift``: without, with a plain and with a deferred shortcut, all plain."""
    y, c = m.activation(*shape), shape[1]
    yield y, *m.norm(c), None, *NONE
    yield y, *m.norm(c), m.activation(*shape), *NONE
    yield y, *m.norm(c), m.activation(*shape), *m.norm(c)
    yield y, *NONE, m.activation(*shape), *NONE


def forwards(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    for i, terms in enumerate(summands(m, shape)):
        yield *terms, None, PLAIN, False, True, None, True, False
        yield *terms, None, [0.5, 0.0, 0.3, 0.0], i % 2 == 0, False, None, False, True
        yield *terms, None, [1.0, 0.0, 0.0, 0.0], True, False, m.vector(shape[1]), False, i % 2 == 0
    for i, gate in enumerate(gates(m, shape)):
        terms = list(summands(m, shape))[i % 4]
        mix = ([0.0, 1.0, 1.0, 0.0], [0.5, -1.5, 2.0, 0.25], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, -1.0])[i % 4]
        yield *terms, gate, mix, i % 3 == 0, True, None, True, i % 3 == 1


def backwards(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    dout, c = m.activation(*shape), shape[1]
    for i, (y, scale, shift, s, s_scale, s_shift) in enumerate(summands(m, shape)):
        sums, s_sums = (NONE if v is None else m.norm(c) for v in (scale, s_scale))
        first, second = (y, scale, shift, *sums), (s, s_scale, s_shift, *s_sums)
        sign = m.sign(("bits", "values")[i % 2], *shape)
        yield dout, sign, *first, *second, None, PLAIN, i % 2 == 0, None, s is not None, False
        yield dout, None, *first, *second, None, [0.5, 0.0, 0.3, 0.0], True, m.vector(c), False, False
        for gate, mix, branch_relu in MIXES[4 + i % 2 :: 2]:
            g = m.activation(*(size if g > 1 else 1 for size, g in zip(shape, gate, strict=True)))
            yield dout, sign, *first, *second, g, mix, branch_relu, None, s is not None, True
    y, s = m.activation(*shape), m.activation(*shape)
    for i, gate in enumerate(gates(m, shape)):
        slope = m.vector(c) if i % 2 else None
        mix = ([0.5, -1.5, 2.0, 0.25], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0])[i % 3]
        yield dout, None, y, *m.norm(c), *m.norm(c), s, *NONE, *NONE, gate, mix, i % 3 == 0, slope, True, True


def reduces(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    dz, y, c = m.activation(*shape), m.activation(*shape), shape[1]
    for kind in (None, "bits", "values"):
        yield dz, m.sign(kind, *shape), y, *m.norm(c), None, *NONE
        yield dz, m.sign(kind, *shape), y, *m.norm(c), m.activation(*shape), *m.norm(c)


def applies(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    dz, y, skip, c = m.activation(*shape), m.activation(*shape), m.activation(*shape), shape[1]
    coefficients = ((None,) * 3, (m.vector(c), None, None), (m.vector(c), m.vector(c), m.vector(c)))
    for kind, abc in zip((None, "bits", "values"), coefficients, strict=True):
        yield dz, m.sign(kind, *shape), y, *abc, *NONE, 1.0
        yield dz, m.sign(kind, *shape), y, *abc, skip, m.sign(kind, *shape), 1.0
        yield dz, m.sign(kind, *shape), y, *abc, skip, None, -0.5


def masks(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    for kind in ("bits", "values"):
        yield m.activation(*shape), m.sign(kind, *shape)


def pools(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    yield m.activation(*shape), *NONE
    yield m.activation(*shape), *m.norm(shape[1])


def spreads(m: Maker, shape: tuple[int, ...]) -> Iterator[tuple]:
    yield m.activation(*shape), m.activation(*shape[:2], 1, 1)


SAMPLES = {
    "forward": forwards, "backward": backwards, "reduce": reduces, "apply": applies, "mask": masks, "pool": pools,
    "spread": spreads,
}  # fmt: skip
every_op = pytest.mark.parametrize("name", SAMPLES)


@every_op
@every_shape
def test_against_the_reference(name, shape):
    """Each sample with a configuration in its turn: the default's and small ones."""
    op = f"bn_add_relu_{name}"
    for i, args in enumerate(SAMPLES[name](maker(torch.float32), shape)):
        compare(op, args, CONFIGS[i % len(CONFIGS)])


@every_op
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
def test_sixteen_bits(name, dtype):
    for i, args in enumerate(itertools.islice(SAMPLES[name](maker(dtype), SHAPES[0]), 12)):
        compare(f"bn_add_relu_{name}", args, CONFIGS[i % len(CONFIGS)])


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_operands_of_any_strides(layout):
    for name, samples in SAMPLES.items():
        for args in itertools.islice(samples(maker(torch.float32, layout), SHAPES[0]), 3):
            compare(f"bn_add_relu_{name}", args)


@pytest.mark.parametrize("name", ["mask", "reduce", "apply", "backward"])
def test_a_packed_mask_of_any_stride(name):
    for args in SAMPLES[name](maker(torch.float32), SHAPES[0]):
        sparse = [
            torch.stack((a, ~a), 1)[:, 0] if isinstance(a, Tensor) and a.dtype == torch.uint8 else a for a in args
        ]
        if any(a is not b for a, b in zip(sparse, args, strict=True)):
            compare(f"bn_add_relu_{name}", tuple(sparse))
            break


@every_dtype
def test_operands_of_unlike_dtypes(dtype):
    """Every tensor of a sample in a dtype of its own."""
    wanted = itertools.cycle(DTYPES[DTYPES.index(dtype) :] + DTYPES[: DTYPES.index(dtype)])
    tolerance = 4e-2  # bf16's
    for name, samples in SAMPLES.items():
        for args in itertools.islice(samples(maker(torch.float32), SHAPES[0]), 3):
            mixed = [a.to(next(wanted)) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args]
            compare(f"bn_add_relu_{name}", tuple(mixed), SMALL[0], tolerance=tolerance)


@every_dtype
def test_the_mask_is_bit_for_bit_the_references(dtype):
    m = maker(dtype)
    shape = SHAPES[1]
    y, scale, shift = m.activation(*shape), torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    y[0, :, 0, 0], y[1, 3, 2, 2], y[2, :, 1, 1] = 0, math.nan, -1
    out, bits, *_ = run(
        "bn_add_relu_forward", (y, scale, shift, None, *NONE, None, PLAIN, False, True, None, True, False), SMALL[0]
    )
    assert torch.equal(bits, reference.pack_mask(~(out <= 0)))
    assert out[1, 3, 2, 2].isnan()
    masked = run("bn_add_relu_mask", (torch.ones_like(y), bits))[0]
    assert torch.equal(masked, reference.unpack_mask(bits, y).to(dtype))
    assert (masked[1, 3, 2, 2], masked[0, 0, 0, 0], masked[2, 5, 1, 1]) == (1, 0, 0)


def test_nan_and_infinity_stay_where_they_are():
    """In one channel of each tensor in turn: the other channels are as without it, this one as the reference's."""
    for name, samples in SAMPLES.items():
        for args in itertools.islice(samples(maker(torch.float32), SHAPES[0]), 2):
            for value, at in itertools.product((math.nan, math.inf), range(len(args))):
                if not (isinstance(args[at], Tensor) and args[at].dim() == 4 and args[at].shape == SHAPES[0]):
                    continue
                bad = args[at].clone()
                bad[1, 5, 2, 3] = value
                given = (*args[:at], bad, *args[at + 1 :])
                expected = getattr(reference, f"bn_add_relu_{name}")(*given)
                expected = (expected,) if isinstance(expected, Tensor) else expected
                for t, e in zip(run(f"bn_add_relu_{name}", given, SMALL[1]), expected, strict=True):
                    assert torch.equal(t.isfinite(), e.isfinite()), name
                    assert torch.equal(t.isnan(), e.isnan()), name


def test_a_shortcut_of_weight_0_is_not_read():
    m = maker(torch.float32)
    y, s = m.activation(*SHAPES[0]), torch.full(SHAPES[0], math.inf, device=DEVICE)
    args = (y, *m.norm(24), s, *NONE, None, [1.0, 0.0, 0.0, 0.0], False, True, None, False, False)
    assert run("bn_add_relu_forward", args)[0].isfinite().all()


@pytest.mark.parametrize("config", [None, *SMALL[:2]], ids=str)
def test_statistics_under_a_large_mean(config):
    """Mean 1e4 deviations from 0, where fp32 E[x^2] - E[x]^2 has no right digit; rows that no tile ends with."""
    y = (maker(torch.float64).activation(3, 8, 13, 7) + 1e4).float()
    args = (y, *NONE, None, *NONE, None, PLAIN, False, False, None, False, True)
    out, _, count, mean, m2 = run("bn_add_relu_forward", args, config)
    assert torch.equal(out, y)
    assert count.tolist() == [3 * 13 * 7]
    exact = y.double()
    assert torch.allclose(mean[0].double(), exact.mean((0, 2, 3)), rtol=3e-7, atol=0)
    variance = exact.var((0, 2, 3), correction=0)
    assert torch.allclose(m2[0].double() / count, variance, rtol=1e-3, atol=0)


def test_sums_of_many_programs():
    """More programs than the last one reads at once."""
    m, shape = maker(torch.float32), (2, 64, 5, 4)
    config = RowsConfig(1, 64, 1, 20)
    args = (m.activation(*shape), None, m.activation(*shape), *m.norm(64), None, *NONE)
    compare("bn_add_relu_reduce", args, config)
    args = (m.activation(*shape), *m.norm(64), None, *NONE, None, PLAIN, False, False, None, False, True)
    compare("bn_add_relu_forward", args, config)


# --- what is declined -------------------------------------------------------------------------------------------------


def reason(name: str, *args: Any) -> str | None:
    return backends.unavailable(f"bn_add_relu_{name}", "triton", *args)


def test_declined():
    m = maker(torch.float32)
    y = m.activation(2, 6, 3, 3)
    text = "the kernel packs the mask of 8 channels into a byte, and there are 6 channels"
    assert reason("forward", y, *NONE, None, *NONE, None, PLAIN, False, True, None, True, False) == text
    assert reason("forward", y, *NONE, None, *NONE, None, PLAIN, False, True, None, False, False) is None
    assert reason("mask", y, m.sign("bits", 2, 6, 3, 3)) == text
    assert reason("mask", y, m.sign("values", 2, 6, 3, 3)) is None
    assert "float64" in reason("pool", y.double(), *NONE)
    assert "empty" in reason("pool", y[:0], *NONE)
    tall = torch.empty((1, 1, 2**15, 2**16), dtype=torch.bfloat16, device="meta")
    assert "2^30 rows" in reason("pool", tall, *NONE)


# --- configurations ---------------------------------------------------------------------------------------------------


RESNET50 = ((256, 64, 56, 56), (256, 256, 56, 56), (256, 128, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7))


def full(t: Any, shape: tuple[int, ...]) -> Any:
    """A sample's argument on the meta device, for activations of another shape."""
    if not isinstance(t, Tensor):
        return t
    if t.dtype == torch.uint8:
        return torch.empty(math.prod(shape) // 8, dtype=torch.uint8, device="meta")
    if t.dim() == 1:
        return torch.empty(shape[1], device="meta")
    sizes = [1 if size == 1 else wanted for size, wanted in zip(t.shape, shape, strict=True)]
    return torch.empty(sizes, dtype=t.dtype, device="meta", memory_format=torch.channels_last)


@every_op
@every_dtype
def test_every_candidate_covers_resnet_50(name, dtype):
    """Powers of two, a launch of programs that all have work, and no candidate twice."""
    op = f"bn_add_relu_{name}"
    module = module_of(op)
    for args, shape in itertools.product(list(SAMPLES[name](maker(dtype), (2, 8, 2, 2))), RESNET50):
        args = tuple(full(a, shape) for a in args)
        problem = module.problem(op, *args)
        assert hash(problem) == hash(module.problem(op, *args))
        candidates = module.candidates(problem)
        assert len(set(candidates)) == len(candidates) >= 3
        for config in candidates:
            assert config.rows & (config.rows - 1) == config.channels & (config.channels - 1) == 0
            assert config.rows * config.channels >= 32 * config.warps
            with use(op, config), recording() as launches:
                found = getattr(module, op)(*args)
            assert len(launches) == 1
            taken = walk(op, args)
            tiles = (
                -(-taken.length // config.rows) * shape[0] if problem.images_apart else -(-taken.rows // config.rows)
            )
            assert taken.programs <= tiles
            assert taken.parts & (taken.parts - 1) == 0
            found = (found,) if isinstance(found, Tensor) else found
            assert [t.shape for t in found] == [t.shape for t in outputs(op, args)]


def test_a_problem_is_what_moves():
    """Bytes of an element read and written, sums, and how the gate varies."""
    m, shape = maker(torch.bfloat16), (2, 8, 3, 3)
    problem = module_of("bn_add_relu_forward").problem
    y, s, norm = m.activation(*shape), m.activation(*shape), m.norm(8)
    plain = problem("bn_add_relu_forward", y, *norm, s, *NONE, None, PLAIN, False, True, None, True, False)
    assert plain == (2, 9, 8, "bf16", 4, 2, True, 0, "", False)
    gate = m.activation(2, 8, 1, 1)
    mix = [0.0, 1.0, 0.0, 0.0]
    gated = problem("bn_add_relu_forward", y, *norm, s.float(), *NONE, gate, mix, False, False, None, False, True)
    assert gated == (2, 9, 8, "bf16", 2, 2, False, 2, "image_channel", False)
    args = (y, None, y, *norm, *norm, s.float(), *NONE, *NONE, gate, [0.0, 1.0, 1.0, 0.0], False, None, True, True)
    assert problem("bn_add_relu_backward", *args) == (2, 9, 8, "bf16", 4, 6, False, 2, "image_channel", True)
    names = {f"bn_add_relu_{name}" for name in SAMPLES}
    assert {op for op in registered if op.startswith("bn_add_relu_")} == names
