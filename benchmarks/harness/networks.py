"""Cases of blocks and of whole networks, and how each peer runs one.

train    A network: cross-entropy, backward, a step of SGD with momentum (``fused=True``). A block: backward from a
         given gradient, to its input and parameters. 16 bits by autocast with fp32 parameters.
infer    Forward in eval mode without gradient, parameters and images in the dtype. torch.compile with freezing.
+graph   The same call captured in a CUDA graph, replayed; our inference by ``resnet_fused.capture``.

All run channels_last but ``eager_nchw`` and ``onnxruntime``, with cuDNN's own search on. The SGD's rate is so small
that the parameters stay what they are: a step of any round could be verified.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import MODELS, STAGES, Stage
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F
from torchvision.models import resnet

import resnet_fused
from harness import jax_peer, onnx_peer
from harness.kernels import BATCH, HEADLINE, SMOKE, build
from harness.protocol import FUSED, GRAPH, LESS_MEMORY, Prepared, Unavailable
from harness.rows import DTYPES
from resnet_fused import traffic
from resnet_fused.cli import bench, models
from resnet_fused.cli.ceilings import Rates
from resnet_fused.cli.compare import full_precision

EAGER = ("eager", "eager_nchw")
COMPILED = {"compile": None, "compile_max_autotune": "max-autotune-no-cudagraphs"}
ON_GPU = tuple(name + suffix for name in (FUSED, *EAGER, *COMPILED) for suffix in ("", GRAPH))
ON_CPU = (FUSED, *EAGER, "compile")
EXTERNAL = {"jax": jax_peer.prepare, "onnxruntime": onnx_peer.prepare}

_MOST_IN_FP64 = 32  # a training step of more images is compared with fp32 (without TF32): fp64 would not fit
_WARM = 3  # calls before a capture
_RATE = 1e-9
_FP16_SCALE = 1024.0  # of the loss, as a GradScaler's


@dataclass(frozen=True)
class Setting:
    """How a module is run."""

    mode: str  # train, infer
    dtype: torch.dtype
    batch: int
    size: int  # height and width

    @property
    def training(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class ModuleCase:
    """A network, or a block of one."""

    kind: str  # network, block
    name: str
    setting: Setting
    impls: tuple[str, ...]
    smoke: bool = False
    stage: Stage | None = None  # of a block

    @property
    def id(self) -> str:
        s = self.setting
        return f"{self.name}-{s.mode}-{DTYPES[s.dtype]}-b{s.batch}"

    @property
    def dtype(self) -> torch.dtype:
        return self.setting.dtype

    @property
    def headline(self) -> bool:
        s = self.setting
        return s.dtype == torch.bfloat16 and s.batch == BATCH and self.name.partition(".")[0] == HEADLINE

    @property
    def channels(self) -> int:
        return 3 if self.stage is None else self.stage.inplanes

    @property
    def info(self) -> dict[str, Any]:
        s = self.setting
        return {
            "kind": self.kind,
            "op": None if self.stage is None else self.stage.kind,
            "model": self.name,
            "mode": s.mode,
            "batch": s.batch,
            "shape": f"{self.channels}x{s.size}x{s.size}",
            "dtype": DTYPES[s.dtype],
        }

    @functools.cached_property
    def count(self) -> traffic.Count:
        s = self.setting
        x = torch.empty(s.batch, self.channels, s.size, s.size, dtype=s.dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(s.training and self.stage is not None)
        return traffic.count(self._module().to(s.dtype), x, s.mode)

    @property
    def traffic(self) -> traffic.Traffic:
        return self.count.total("fused")

    def bound_s(self, rates: Rates) -> float:
        """Of the fused plan: op by op."""
        return sum(rates.bound_s(row.traffic.bytes, row.traffic.flops) for row in self.count.fused)

    def _module(self) -> nn.Module:
        return copy.deepcopy(_network(self.name) if self.stage is None else _block(self.stage))

    def open(self, device: torch.device) -> ModuleBench:
        torch.compiler.reset()
        s = self.setting
        x = models.images(s.batch, s.size, 0, channels=self.channels)
        kind = NetworkBench if self.stage is None else BlockBench
        return kind(self.name, self._module(), x.to(device), s)


@functools.cache
def _network(name: str) -> nn.Module:
    """In fp32 on the CPU, its norms like a trained network's."""
    torch.manual_seed(0)
    model = build(name)
    models.seeded(model, models.images(2, 64 if name in SMOKE else 224, 0), 0)
    return model


@functools.cache
def _block(stage: Stage) -> nn.Module:
    torch.manual_seed(0)
    cls = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[stage.kind]
    width = stage.planes * cls.expansion
    shortcut = None
    if stage.stride != 1 or stage.inplanes != width:
        shortcut = nn.Sequential(nn.Conv2d(stage.inplanes, width, 1, stage.stride, bias=False), nn.BatchNorm2d(width))
    block = cls(stage.inplanes, stage.planes, stage.stride, shortcut)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    return block


# --- running one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """A forward without gradient."""

    module: nn.Module
    x: Tensor

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.module(self.x)


@dataclass
class ModuleBench:
    """A module and its input on a device."""

    name: str
    module: nn.Module  # fp32, on the CPU, eager
    x: Tensor  # (N, C, H, W), fp32
    setting: Setting
    device_only: bool = False
    worst: float = 1.0  # of a deep network's gradient in 16 bits
    few: int = 8  # images whose outputs are compared with fp64 in inference
    floor: float = field(init=False)
    _pool: Any = None  # memory that all graphs of this case share: they never run at the same time
    _steps: dict[str, Any] = field(default_factory=dict)  # one module serves an implementation and its graph

    def __post_init__(self) -> None:
        self.floor = bench.TOLERANCES[self.setting.dtype]

    @property
    def device(self) -> torch.device:
        return self.x.device

    def prepare(self, impl: str) -> Prepared:
        if impl in EXTERNAL:
            return EXTERNAL[impl](self)
        name = impl.removesuffix(GRAPH)
        if name != impl and self.device.type != "cuda":
            raise Unavailable("needs a CUDA GPU")
        if name not in self._steps:
            self._steps[name] = self._first(name)
        call, read = self._steps[name]
        return Prepared(call if name == impl else self._graph(name, call), read, COMPILED.get(name))

    def _first(self, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """The step of one implementation after its first call, in which torch.compile compiles."""
        module, x = self._variant(name)
        freezes = name in COMPILED and not self.setting.training
        with inductor.patch(freezing=True) if freezes else contextlib.nullcontext():
            call, read = self.step(module, x, self.setting.dtype)
            call()
        return call, read

    def _variant(self, name: str) -> tuple[nn.Module, Tensor]:
        """The module as one implementation runs it, and its input."""
        module = copy.deepcopy(self.module).to(self.device).train(self.setting.training)
        if name == "eager_nchw":
            return module, self.x
        module = module.to(memory_format=torch.channels_last)
        x = self.x.contiguous(memory_format=torch.channels_last)
        if name == FUSED or name in LESS_MEMORY:
            module = resnet_fused.fuse(module, memory=LESS_MEMORY.get(name, "save"))
        if name in COMPILED:
            module = torch.compile(module, mode=COMPILED[name], dynamic=False)
        return module, x

    def step(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """The call that is timed, and how to read what it returns."""
        if self.setting.training:
            return self.train_step(module, x, dtype)
        return Inference(module.to(dtype), x.to(dtype)), lambda out: {"output": out[: self.few]}

    def train_step(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
        raise NotImplementedError

    def exact(self) -> dict[str, Tensor]:
        module, x = self._variant("eager")
        few = x if self.setting.training else x[: self.few]
        wide = torch.float64 if len(few) <= _MOST_IN_FP64 else torch.float32
        with full_precision(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            call, read = self.step(module.to(wide), few.to(wide), wide)
            return {name: t.double() for name, t in read(call()).items()}

    def _graph(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` as a replay of a CUDA graph, made as the documentation of each implementation has it."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if name == FUSED and isinstance(call, Inference):
            replay = resnet_fused.capture(call.module, call.x, pool=self._pool, clone_outputs=False)
            return lambda: replay(*replay.inputs)
        return self._captured(call)

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` as PyTorch's documentation captures a whole network."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = call()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


class NetworkBench(ModuleBench):
    """A whole network."""

    @functools.cached_property
    def labels(self) -> Tensor:
        return torch.arange(len(self.x), device=self.device) % 1000

    def train_step(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(module.parameters(), lr=_RATE, momentum=0.9, weight_decay=1e-4, fused=True)
        amp, scale = autocast(self.device, dtype), _FP16_SCALE if dtype == torch.float16 else 1.0

        def train() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with amp:
                loss = F.cross_entropy(module(x), self.labels)
            (loss * scale).backward()
            optimizer.step()
            return loss.detach()

        return train, lambda loss: {"loss": loss, "gradient": _flat(p.grad for p in module.parameters()) / scale}


class BlockBench(ModuleBench):
    """A residual block."""

    def train_step(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
        x = x.detach().clone().to(dtype).requires_grad_()
        amp = autocast(self.device, dtype)
        ones: list[Tensor] = []  # the gradient of the output, made once

        def train() -> Tensor:
            x.grad = None
            module.zero_grad(set_to_none=True)
            with amp:
                out = module(x)
            if not ones:
                ones.append(torch.ones_like(out))
            out.backward(ones[0])
            return out.detach()

        def read(out: Tensor) -> dict[str, Tensor]:
            return {"output": out, "dx": x.grad, "gradient": _flat(p.grad for p in module.parameters())}

        return train, read


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast in 16 bits, nothing in others."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()


def _flat(gradients: Iterator[Tensor | None]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


# --- the tables -----------------------------------------------------------------------------------------------------


def _settings(device: torch.device, size: int) -> Iterator[Setting]:
    dtypes = tuple(DTYPES) if device.type == "cuda" else (torch.float32,)
    batches = (BATCH, 32, 1) if device.type == "cuda" else (4, 1)
    for dtype in dtypes:
        for batch in batches:
            for mode in ("train", "infer"):
                yield Setting(mode, dtype, batch, size)


def _impls(device: torch.device, mode: str) -> tuple[str, ...]:
    if device.type == "cuda":
        return (*ON_GPU, *LESS_MEMORY) if mode == "train" else ON_GPU
    return (*ON_CPU, *LESS_MEMORY) if mode == "train" else (*ON_CPU, "onnxruntime")


def networks(device: torch.device) -> list[ModuleCase]:
    """Every model, mode, batch and dtype; the usual yardstick first."""
    return [
        ModuleCase("network", model.name, setting, _impls(device, setting.mode) + (("jax",) if has_jax else ()))
        for setting in _settings(device, 224)
        for model in MODELS
        for has_jax in (device.type == "cuda" and model.name == jax_peer.MODEL,)
    ]


def blocks(device: torch.device) -> list[ModuleCase]:
    """The blocks of the stages, at the largest batch."""
    impls = ON_GPU if device.type == "cuda" else ON_CPU
    found = []
    for setting in _settings(device, 0):
        if setting.batch in (BATCH, 4):
            for stage in STAGES:
                sized = Setting(setting.mode, setting.dtype, setting.batch, stage.size)
                found.append(ModuleCase("block", stage.name, sized, impls, stage=stage))
    return found


def smoke_networks(device: torch.device, *, quick: bool) -> list[ModuleCase]:
    """A small network; ``quick`` leaves out what takes long to build."""
    impls = {mode: (FUSED, *EAGER) if quick else _impls(device, mode) for mode in ("train", "infer")}
    return [
        ModuleCase("network", "smoke_basic", Setting(mode, torch.float32, 2, 64), impls[mode], smoke=True)
        for mode in impls
    ]


def smoke_blocks(device: torch.device, *, quick: bool) -> list[ModuleCase]:
    """A small block of each kind."""
    impls = (FUSED, *EAGER) if quick else ON_GPU if device.type == "cuda" else ON_CPU
    stages = (
        Stage("smoke.bottleneck", "bottleneck", 16, 4, 1, 8, "identity"),
        Stage("smoke.basic", "basic", 8, 16, 2, 8, "projection"),
    )
    return [
        ModuleCase("block", s.name, Setting(mode, torch.float32, 2, s.size), impls, smoke=True, stage=s)
        for s in stages
        for mode in ("train", "infer")
    ]
