"""How the extension's 3x3 convolutions are tested: on the GPU where there is one, else in the emulator on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import emulated
import torch
from cases import CONVS, ConvCase
from helpers import assert_close, assert_no_worse, is_channels_last
from kernel_helpers import outputs
from test_ops import TOLERANCE, Maker, exact, flatten, samples
from torch import Tensor

from resnet_fused import backends, tuning
from resnet_fused.cuda import conv3x3
from resnet_fused.ops._op import ops as registered
from resnet_fused.tuning import ConvConfig

CASES = tuple(case for case in CONVS if case.kernel == 3)
LARGER = (
    #        R  N  C   H   W   K  s  d  g
    ConvCase(3, 2, 24, 13, 11, 72, 1, 1, 1, "several tiles of pixels and of channels, the last ones partial"),
    ConvCase(3, 3, 136, 7, 6, 64, 1, 1, 1, "several blocks of channels, images within a tile"),
    ConvCase(3, 2, 16, 15, 12, 136, 2, 1, 1, "stride 2 in several tiles"),
    ConvCase(3, 2, 64, 12, 13, 8, 3, 1, 1, "stride 3"),
    ConvCase(3, 1, 8, 17, 14, 24, 2, 2, 1, "stride and dilation 2: pixels that no tap reaches"),
    ConvCase(3, 1, 16, 12, 12, 16, 1, 3, 1, "dilation 3"),
    ConvCase(3, 2, 128, 7, 7, 128, 1, 1, 32, "32 groups of 4"),
    ConvCase(3, 2, 96, 6, 7, 192, 2, 1, 2, "groups wider than a tile is not"),
    ConvCase(3, 2, 72, 7, 6, 72, 1, 1, 72, "depthwise"),
    ConvCase(3, 2, 13, 9, 8, 19, 1, 1, 1, "odd channels: nothing is aligned"),
    ConvCase(3, 5, 40, 1, 1, 48, 1, 1, 1, "single pixels"),
    ConvCase(3, 1, 16, 3, 150, 16, 1, 1, 1, "an image wider than a tile"),
)
CHIPS = ("portable", "hopper")


def emulate(**settings) -> None:
    """Choose the emulated device."""
    emulated.module().settings(**settings)
    conv3x3._built.cache_clear()


@contextlib.contextmanager
def forced(op: str, configs: dict[str, ConvConfig]) -> Iterator[None]:
    """Within it ``op`` runs in the extension, with the configurations that are given."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.use_backend("cuda"))
        for of, config in configs.items():
            stack.enter_context(tuning.use(of, config))
        yield


def run(op: str, args: tuple, configs: dict[str, ConvConfig] | None = None) -> tuple[Tensor, ...]:
    with forced(op, configs or {}):
        return flatten(registered[op](*args))


def ways(op: str, args: tuple, *, every: bool = False) -> list[dict[str, ConvConfig]]:
    """The first configuration for each chip, or every one. ``bprop`` takes those of its halves."""
    if op == "conv3x3_bprop":
        halves = "conv3x3_dgrad", "conv3x3_wgrad"
        offered = [conv3x3.candidates(half, *part) for half, part in zip(halves, parts(args), strict=True)]
        return [
            {half: config for half, config in zip(halves, found, strict=True) if config is not None}
            for found in zip(*(_first(configs) for configs in offered), strict=True)
        ]
    offered = conv3x3.candidates(op, *args)
    chosen = offered if every else [config for config in _first(offered) if config is not None]
    return [{op: config} for config in chosen]


def _first(offered: tuple[ConvConfig, ...]) -> list[ConvConfig | None]:
    found = [next((c for c in offered if c.chip == chip), None) for chip in CHIPS]
    return found if found[1] is not None else found[:1]


def parts(args: tuple) -> tuple[tuple, tuple]:
    """The arguments of dgrad and wgrad of a ``bprop``."""
    return args[:-1], (*args[:11], *args[16:])


def supported(op: str, m: Maker, case: ConvCase) -> list[tuple]:
    """The samples without slopes, which are the only ones that the kernels decline."""
    found = []
    for args in samples(op, m, case):
        reason = backends.unavailable(op, "cuda", *args)
        assert reason in (None, "the kernel has the ReLU only, not the PReLU's slopes")
        if reason is None:
            found.append(args)
    assert len(found) > 2
    return found


def compare(op: str, args: tuple, *, every: bool = False, floor: float | None = None) -> None:
    """Against fp64, and beside PyTorch's own error in the dtype; the same bits twice, arguments kept."""
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    tolerance = TOLERANCE[dtype] if floor is None else floor
    truth, theirs = exact(op, args), flatten(backends.implementations(op)["aten"].run(*args))
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    tried = ways(op, args, every=every)
    assert tried
    for configs in tried:
        found, again = run(op, args, configs), run(op, args, configs)
        for i, (t, e, other, like) in enumerate(zip(found, truth, theirs, outputs(op, args), strict=True)):
            what = f"{configs}, output {i}"
            assert_close(t, e, tolerance, what)
            assert_no_worse(t, other, e, tolerance / 8, what)
            assert t.dtype == like.dtype, what
            if t.dim() == 4 and is_channels_last(like):
                assert is_channels_last(t), what
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), f"{configs}: other bits again"
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor)), (
        "argument changed"
    )
