"""Cases of single ops: every call that the networks of ``cases.NETWORKS`` make, and the ops that only other units call.

The calls are recorded from the networks themselves, on tensors without storage, so the table cannot miss a shape or an
option. A ``bprop`` is there as the package calls it, and besides as the dgrad and the wgrad that it stands for. wgrad
alone takes ``dy`` from dgrad in eager PyTorch, so its eager row leaves out the pass that forms it: compare ``bprop``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cases import NETWORKS, Network
from torch import Tensor
from torchvision import models

from harness import cudnn_graphs, eager
from harness.protocol import FUSED, Prepared, Unavailable
from harness.rows import DTYPES
from resnet_fused import backends, reference, traffic, tuning
from resnet_fused.cli.ceilings import Rates
from resnet_fused.cli.compare import FLOORS
from resnet_fused.cuda import _device
from resnet_fused.ops._op import ops as registered
from resnet_fused.tuning import calls

HEADLINE = "resnet50"  # in bf16, at the largest batch
BATCH = 256
SMOKE_BATCH = 2
SMOKE = {
    "smoke_bottleneck": (models.resnet.Bottleneck, [2, 1, 1, 1]),
    "smoke_basic": (models.resnet.BasicBlock, [1, 1, 1, 1]),
}
_TILES = ("count", "mean", "m2")
_OUTPUTS = {
    "fprop": ("y", *_TILES),
    "infer": ("y",),
    "dgrad": ("dx", "dbeta", "dgamma", "dslope"),
    "wgrad": ("dw",),
    "bprop": ("dx", "dbeta", "dgamma", "dslope", "dw"),
    "bn_statistics": _TILES,
    "bn_merge": _TILES,
    "bn_finalize": ("scale", "shift", "mean", "rstd", "var"),
    "bn_coefficients": ("a", "b", "c"),
    "bn_add_relu_forward": ("out", "mask", *_TILES),
    "bn_add_relu_backward": (
        "dz", "dshortcut", "dbeta", "dgamma", "shortcut_dbeta", "shortcut_dgamma", "dgate", "dslope"
    ),
    "bn_add_relu_mask": ("dz",),
    "bn_add_relu_reduce": ("dbeta", "dgamma", "shortcut_dgamma"),
    "bn_add_relu_apply": ("dy",),
    "bn_add_relu_pool": ("pool",),
    "bn_add_relu_spread": ("dz",),
    "stem_forward": ("out",),
    "stem_infer": ("out",),
    "stem_reduce": ("dbeta", "dgamma"),
    "stem_apply": ("dy",),
    "stem_backward": ("dy", "dbeta", "dgamma"),
}  # fmt: skip
_POSITIVE = ("scale", "shortcut_scale", "a", "rstd", "shortcut_rstd", "m2")
_ARITHMETIC = ("bn_merge", "bn_finalize", "bn_coefficients")  # of a few vectors: no sequence of eager's stands for them


def direction(op: str) -> str:
    """``dgrad`` of ``conv1x1_dgrad``."""
    return op.rpartition("_")[2]


def outputs(op: str) -> tuple[str, ...]:
    """Names of what ``op`` returns."""
    return _OUTPUTS[direction(op) if op.startswith("conv") else op]


def named(op: str, found: Any) -> dict[str, Tensor]:
    """What ``op`` returned by name, without what was not asked for; statistics merged to ``mean`` and ``var``."""
    tensors = (found,) if isinstance(found, Tensor) else tuple(found)
    result = {name: t for name, t in zip(outputs(op), tensors, strict=True) if t.numel()}
    if set(_TILES) <= result.keys():
        count, mean, m2 = reference.bn_merge(*(result.pop(name) for name in _TILES))
        result |= {"mean": mean[0], "var": m2[0] / count}
    return result


def arguments(op: str, args: tuple[Any, ...]) -> SimpleNamespace:
    """``args`` by the names of the schema."""
    names = [argument.name for argument in registered[op].overload._schema.arguments]
    return SimpleNamespace(**dict(zip(names, args, strict=True)))


# --- operands -------------------------------------------------------------------------------------------------------


def realise(op: str, args: tuple[Any, ...], device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Random tensors of the shapes, strides and dtypes of ``args``, which are on the meta device."""
    generator = torch.Generator(device).manual_seed(seed)
    given = vars(arguments(op, args))
    return tuple(_random(name, t, given, generator) if isinstance(t, Tensor) else t for name, t in given.items())


def _random(name: str, like: Tensor, given: dict[str, Any], generator: torch.Generator) -> Tensor:
    t = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=generator.device)
    if like.dtype == torch.uint8:
        return t.random_(0, 256, generator=generator)
    if like.dtype == torch.int32:
        y = given.get("y")
        return t.fill_(4096 if y is None else y.numel() // y.shape[1])
    if name in _POSITIVE:
        return t.uniform_(0.5, 1.5, generator=generator)
    t.normal_(generator=generator)
    if name == "weight" and like.dim() == 4:
        return t.mul_(1 / math.sqrt(like[0].numel()))
    return t.relu_() if name in ("sign", "skip_sign") else t


def exact(op: str, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The reference in fp64, on the device of ``args``."""
    function = f"conv_{direction(op)}" if op.startswith("conv") else op
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        return named(op, getattr(reference, function)(*(_wide(a) for a in args)))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value


# --- one case -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One call of an op; ``args`` are on the meta device."""

    op: str
    args: tuple[Any, ...]
    models: tuple[str, ...]  # which call it; empty: only other units do
    mode: str  # train, infer
    dtype: torch.dtype
    smoke: bool = False

    @property
    def headline(self) -> bool:
        return self.dtype == torch.bfloat16 and HEADLINE in self.models

    @functools.cached_property
    def activation(self) -> Tensor | None:
        """The tensor whose shape names the case: what a convolution reads, else the first activation."""
        known = vars(arguments(self.op, self.args))
        four = [t for t in known.values() if isinstance(t, Tensor) and t.dim() == 4]
        return known.get("x", known.get("y", four[0] if four else None))

    @property
    def batch(self) -> int | None:
        return None if self.activation is None else self.activation.shape[0]

    @functools.cached_property
    def id(self) -> str:
        stem, _, name = self.op.rpartition("_")
        parts = [stem, name, "+".join(self.models) or "units", self.mode, self.shape.replace(" ", "-")]
        parts += [DTYPES[self.dtype]] + ([f"b{self.batch}"] if self.batch else [])
        return "-".join(parts)

    @functools.cached_property
    def shape(self) -> str:
        """Sizes without the batch, and the options that make another kernel of it."""
        a = arguments(self.op, self.args)
        x = self.activation
        if x is None:
            return "x".join(str(size) for size in self.args[1].shape)
        words = ["x".join(str(size) for size in x.shape[1:])]
        if self.op.startswith(("conv", "stem_infer")):
            words.append(f"k{a.weight.shape[0]}")
        words += [f"{letter}{value}" for letter, value in self._geometry(a) if value != 1]
        return " ".join(words + [word for word, present in _options(a) if present])

    def _geometry(self, a: Any) -> tuple[tuple[str, int], ...]:
        return tuple((letter, getattr(a, name, 1)) for letter, name in zip("sdg", ("stride", "dilation", "groups")))  # noqa: B905

    @functools.cached_property
    def traffic(self) -> traffic.Traffic:
        return traffic.of(self.op, self.args)

    @property
    def impls(self) -> tuple[str, ...]:
        if self.op in _ARITHMETIC:
            return (FUSED,)
        has_cudnn = direction(self.op) in cudnn_graphs.DIRECTIONS and self.op.startswith("conv")
        return (FUSED, "eager", "cudnn") if has_cudnn else (FUSED, "eager")

    @property
    def info(self) -> dict[str, Any]:
        name = direction(self.op)
        return {
            "kind": "kernel",
            "op": self.op.rpartition("_")[0],
            "direction": {"infer": "forward" if self.op == "stem_infer" else "fprop"}.get(name, name),
            "model": "+".join(self.models) or None,
            "mode": self.mode,
            "batch": self.batch,
            "shape": self.shape,
            "dtype": DTYPES[self.dtype],
        }

    def bound_s(self, rates: Rates) -> float:
        return rates.bound_s(self.traffic.bytes, self.traffic.flops)

    def open(self, device: torch.device) -> KernelBench:
        return KernelBench(self.op, realise(self.op, self.args, device), FLOORS[self.dtype])


def _options(a: Any) -> Iterator[tuple[str, bool]]:
    """What is given beside the shapes."""
    present = {name for name, value in vars(a).items() if isinstance(value, Tensor)}
    yield "deferred", "x" in vars(a) and "scale" in present
    yield "shortcut", "shortcut" in present and "shortcut_scale" not in present and "shortcut_mean" not in present
    yield "projection", bool({"shortcut_scale", "shortcut_mean"} & present)
    yield "residual", "residual" in present
    yield "linear", getattr(a, "relu", True) is False
    yield "masked", "sign" in present and "dz" in present
    yield "skip", "skip" in present
    yield "gated", "gate" in present


@dataclasses.dataclass
class KernelBench:
    """The operands of a :class:`KernelCase`."""

    op: str
    args: tuple[Any, ...]
    floor: float
    worst: float = 0.1
    device_only: bool = True

    def exact(self) -> dict[str, Tensor]:
        return exact(self.op, self.args)

    def prepare(self, impl: str) -> Prepared:
        if impl == FUSED:
            run = registered[self.op]
            return Prepared(lambda: run(*self.args), lambda found: named(self.op, found), chosen(self.op, self.args))
        make, read = {"eager": (eager.prepare, dict), "cudnn": (cudnn_graphs.prepare, cudnn_graphs.read)}[impl]
        try:
            return Prepared(make(self.op, arguments(self.op, self.args)), read)
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error


def chosen(op: str, args: tuple[Any, ...]) -> str:
    """The backend that runs these arguments, and the configurations that its kernels take."""
    labels: list[str] = []

    def noted(*problem: Any) -> tuning.Config:
        config = tuning.choice.choose(*problem)
        labels.append(tuning.configs.label(config))
        return config

    run = _device.run

    def launched(function: Callable[..., None], *given: Any) -> None:
        config = getattr(getattr(function, "__self__", None), "config", None)  # of the extension's convolutions
        if config is not None:
            labels.append(tuning.configs.label(tuning.ConvConfig(*config)))
        run(function, *given)

    with mock.patch.object(tuning, "choose", noted), mock.patch.object(_device, "run", launched):
        registered[op](*args)
    return ", ".join([backends.choose(op, *args).backend, *labels])


# --- the table ------------------------------------------------------------------------------------------------------


def table() -> list[KernelCase]:
    """Every op and direction of the networks, in 16 bits and fp32."""
    found = _cases(NETWORKS, BATCH, 224)
    sized = [_in_dtype(case, dtype) for dtype in DTYPES for case in found if case.op not in _ARITHMETIC]
    return sized + [_in_dtype(case, torch.float32) for case in found if case.op in _ARITHMETIC]


def smoke() -> list[KernelCase]:
    """The smallest case of each op, direction and set of options."""
    small = Network("smoke_bottleneck", "small enough for a smoke check on the CPU")
    firsts: dict[Any, KernelCase] = {}
    for case in sorted(_cases((small,), SMOKE_BATCH, 32), key=lambda case: case.traffic.flops):
        key = case.op, tuple(_options(arguments(case.op, case.args))), case.mode
        named_so = dataclasses.replace(case, models=case.models or ("smoke_units",), smoke=True)
        firsts.setdefault(key, _in_dtype(named_so, torch.float32))
    return list(firsts.values())


def build(name: str) -> torch.nn.Module:
    """A network of torchvision, or a small one of the smoke checks."""
    if name in SMOKE:
        return models.ResNet(*SMOKE[name])
    return models.get_model(name, weights=None)


@functools.cache
def _cases(networks: tuple[Network, ...], batch: int, size: int) -> tuple[KernelCase, ...]:
    """In bf16, the calls of all ``networks`` without repetition, then those of other units."""
    found: dict[Any, KernelCase] = {}
    for network in networks:
        for mode in ("train", "infer"):
            make, train = functools.partial(build, network.name), mode == "train"
            recorded = calls.of_model(make, batch=batch, size=size, dtype=torch.bfloat16, train=train)
            other = list(_of_other_units(recorded)) if train else []
            for called, by in ((recorded, (network.name,)), (other, ())):
                for call in _with_parts(called):
                    key = _key(call)
                    seen = found[key].models if key in found else ()
                    names = tuple(dict.fromkeys((*seen, *by)))
                    found[key] = KernelCase(call.op, call.args, names, mode, torch.bfloat16)
    return tuple(found.values())


def _key(call: calls.Call) -> tuple[Any, ...]:
    """What tells calls apart."""
    known = ((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in call.args)
    return call.op, *known


def _with_parts(recorded: list[calls.Call]) -> Iterator[calls.Call]:
    for call in recorded:
        yield call
        parts = traffic.parts(call.op, call.args)
        if len(parts) > 1:
            yield from (calls.Call(op, args) for op, args in parts)


def _of_other_units(recorded: list[calls.Call]) -> Iterator[calls.Call]:
    """The ops of pre-activated, gated and synchronised units, on the block ends and the stem of ``recorded``."""
    for call in recorded:
        a = arguments(call.op, call.args)
        if call.op == "bn_add_relu_reduce" and a.shortcut is None:
            yield from _of_end(a)
        if call.op == "stem_backward":
            yield calls.Call("stem_reduce", (a.dout, a.y, a.scale, a.shift, a.mean, a.rstd))
            yield calls.Call("stem_apply", (a.dout, a.y, a.scale, a.shift, a.scale, a.scale, a.scale))


def _of_end(a: Any) -> Iterator[calls.Call]:
    y, v = a.y, a.mean
    gate = torch.empty(*y.shape[:2], 1, 1, dtype=y.dtype, device="meta")
    tiles = torch.empty(8, dtype=torch.int32, device="meta"), *(v.new_empty((8, len(v))) for _ in range(2))
    yield calls.Call("bn_statistics", (y,))
    yield calls.Call("bn_merge", tiles)
    yield calls.Call("bn_add_relu_mask", (a.dz, a.sign))
    yield calls.Call("bn_add_relu_apply", (a.dz, None, y, v, v, v, a.dz, None, 1.0))
    squeezed = (y, v, v, v, v, y, None, None, None, None, gate, (0.0, 1.0, 1.0, 0.0), False, None, False, True)
    yield calls.Call("bn_add_relu_backward", (a.dz, a.sign, *squeezed))
    yield calls.Call("bn_add_relu_pool", (y, v, v))
    yield calls.Call("bn_add_relu_spread", (a.dz, gate))


def _in_dtype(case: KernelCase, dtype: torch.dtype) -> KernelCase:
    """``case`` with its 16-bit tensors in ``dtype``."""
    return dataclasses.replace(case, args=tuple(_cast(a, case.dtype, dtype) for a in case.args), dtype=dtype)


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype == old:
        return torch.empty_strided(value.shape, value.stride(), dtype=new, device="meta")
    return value
