"""Inference of a whole model as a CUDA graph, replayed by a call (docs/graphs.md).

What inference folds is made before the capture and held by the replay, so a graph has the convolutions alone in it. A
graph reads addresses, and knows nothing of Python: at every call the model is compared with what it was when it was
captured, while the GPU is at work, and if it has changed it is captured anew before the call returns.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from resnet_fused import backends
from resnet_fused.blocks import paths
from resnet_fused.blocks.pinned import Pins, pinned


def capture(model: nn.Module, *examples: Tensor, pool: Any = None, clone_outputs: bool = True) -> Replay:
    """Capture ``model(*examples)`` in inference; where ``examples`` are not on a CUDA device, the model is called.

    The backend that is forced, ``disabled()`` and autocast are at every call what they are now.

    Args:
        model: in eval mode, neither compiled nor scripted, with all parameters and buffers on the examples' device. It
            returns tensors, or tuples, lists and dicts of tensors.
        examples: tensors whose shapes, dtypes, devices and strides all inputs have.
        pool: memory of other graphs to share, ``Replay.pool`` or ``torch.cuda.graph_pool_handle()``: for graphs that
            never run at the same time.
        clone_outputs: give copies of the outputs; else the graph's own tensors, which its next call overwrites, and the
            next call of any graph that shares its memory.
    Raises:
        ValueError: no examples, or on several devices, or with elements that share memory; a module in training mode; a
            parameter or buffer on another device, or an inference tensor, whose writes PyTorch does not count; a model
            that writes to its input.
        TypeError: ``model``, an example, a parameter, a buffer or an output is of another type than described.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: expected model to be an nn.Module, got {type(model).__name__}")
    if not examples:
        raise ValueError("capture: expected at least one example, got none")
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise TypeError(f"capture: expected example {i} to be a tensor, got {type(x).__name__}")
        if x.device != examples[0].device:
            raise ValueError(f"capture: expected examples on one device, got {examples[0].device} and {x.device}")
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(
                f"capture: expected example {i} to have an element at each address, got strides {x.stride()}"
            )
    return Replay(model, examples, pool, clone_outputs)


class Replay:
    """A captured model; :func:`capture` makes it. Not to be called by several threads or in several streams at once."""

    inputs: tuple[Tensor, ...]
    """What the graph reads. An input is copied here, unless it is the very tensor: to save the copy, write into it."""
    recaptures: int
    """How often the model was captured anew."""

    def __init__(self, model: nn.Module, examples: tuple[Tensor, ...], pool: Any, clone_outputs: bool) -> None:
        self._model, self._pool, self._clone_outputs = model, pool, clone_outputs
        self._device = examples[0].device
        device = self._device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._backend, self._disabled = backends.forced(), paths._is_disabled()
        with torch.inference_mode(False):
            self.inputs = tuple(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in examples
            )
        self._recorder = _RECORDERS[device](self._device) if device in _RECORDERS else None
        self._recorded: _Recorded | None = None
        self.recaptures = 0
        self._fill(examples)
        if self._recorder is None:
            _check_model(model, self._device)
            _flatten(self._run())
        else:
            self._recorded = self._record(self._recorder)

    @property
    def pool(self) -> Any:
        """The graph's memory, for ``capture(..., pool=)``; None without a graph."""
        return self._pool if self._recorded is None else self._recorded.graph.pool()

    def __call__(self, *inputs: Tensor) -> Any:
        """The model's output for ``inputs``, without gradient.

        Raises:
            ValueError, TypeError: an input is not like its example; the model has become one that cannot be captured.
        """
        self._check(inputs)
        if self._recorder is None or self._recorded is None:
            _check_mode(self._model)
            with self._as_captured():
                return self._model(*inputs)
        self._fill(inputs)
        self._recorded.graph.replay()
        change = self._recorded.watch.change()
        if change is not None:
            self._recorded = self._record(self._recorder)
            self.recaptures += 1
            name = type(self._model).__name__
            backends.logger.info("capture: %s was captured anew (%d times so far): %s", name, self.recaptures, change)
            self._recorded.graph.replay()
        outputs, structure = self._recorded.outputs, self._recorded.structure
        if self._clone_outputs:
            outputs = [out.clone() if isinstance(out, Tensor) else out for out in outputs]
        return tree_unflatten(outputs, structure)

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"replay: expected {len(self.inputs)} inputs, got {len(inputs)}")
        for i, (x, held) in enumerate(zip(inputs, self.inputs, strict=True)):
            if x is held:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"replay: expected input {i} to be a tensor, got {type(x).__name__}")
            for what, found, wanted in (
                ("shape", tuple(x.shape), tuple(held.shape)),
                ("dtype", x.dtype, held.dtype),
                ("device", x.device, held.device),
            ):
                if found != wanted:
                    raise ValueError(f"replay: expected input {i} of {what} {wanted}, got {found}")
            # Of a dimension of size 1 the stride has no meaning.
            if any(a != b and n > 1 for a, b, n in zip(x.stride(), held.stride(), x.shape, strict=True)):
                raise ValueError(f"replay: expected input {i} of strides {held.stride()}, got {x.stride()}")

    @torch.no_grad()
    def _fill(self, inputs: tuple[Tensor, ...]) -> None:
        for x, held in zip(inputs, self.inputs, strict=True):
            if x is not held:
                held.copy_(x)

    def _run(self) -> Any:
        """The model on the graph's own inputs, which a capture reads several times."""
        versions = [x._version for x in self.inputs]
        with self._as_captured():
            out = self._model(*self.inputs)
        for i, (x, version) in enumerate(zip(self.inputs, versions, strict=True)):
            if x._version != version:
                raise ValueError(f"capture: expected model to leave its inputs as they are, got a write to input {i}")
        return out

    @contextlib.contextmanager
    def _as_captured(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        # The casts of weights that autocast caches would be made outside the graph and freed with autocast's end.
        autocast = torch.autocast(self._device.type, dtype, enabled, cache_enabled=False)
        disabled = paths.disabled() if self._disabled else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), autocast, backends.use_backend(self._backend), disabled:
            yield

    def _record(self, recorder: CudaRecorder) -> _Recorded:
        """Capture into the memory of the graph that is replaced; that one is held until then, so the memory is."""
        _check_model(self._model, self._device)
        pins = Pins(self._model)
        with _capturing, pinned(pins):
            recorder.warm_up(self._run)
            pins.complete = True
            graph, out = recorder.record(self._run, self.pool)
        return _Recorded(graph, *_flatten(out), _Watch(self._model, pins))


_capturing = threading.RLock()  # PyTorch captures one graph at a time, and all go through one stream


class _Recorded(NamedTuple):
    """A graph and all whose memory it reads or writes."""

    graph: Any
    outputs: list[Any]
    structure: TreeSpec
    watch: _Watch


def _flatten(out: Any) -> tuple[list[Any], TreeSpec]:
    leaves, structure = tree_flatten(out)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(
                f"capture: expected model to return tensors in tuples, lists and dicts, got {type(leaf).__name__}"
            )
    return leaves, structure


# --- the device ------------------------------------------------------------------------------------------------------

_WARM_UPS = 2  # calls in the side stream


class CudaRecorder:
    """Records the work of a call on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Make what is made once: in libraries, and what inference folds.

        The first call is in the caller's stream, to which what is folded belongs from then on: the allocator then gives
        its memory away in the order of that stream, after the replays in it.
        """
        with torch.cuda.device(self._device):
            run()
            caller, side = torch.cuda.current_stream(), _side_stream(self._device)
            side.wait_stream(caller)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            caller.wait_stream(side)

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        """The graph, and what ``run`` returned: its tensors are the graph's."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU, such as one that pins the next batch.
        how = {"pool": pool, "stream": _side_stream(self._device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, **how):
            out = run()
        return graph, out


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: every other stream would have its own workspaces in libraries."""
    return torch.cuda.Stream(device)


_RECORDERS = {"cuda": CudaRecorder}
"""By type of device; on others the model is called."""


# --- the model -------------------------------------------------------------------------------------------------------


def _check_mode(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        name = next(name for name, module in model.named_modules() if module.training)
        raise ValueError(f"capture: expected model in eval mode, got training=True at {name or 'the model itself'}")


def _check_model(model: nn.Module, device: torch.device) -> None:
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            kind = "a scripted" if scripted else "a compiled"
            raise TypeError(f"capture: expected an eager model, got {kind} module at {name or 'the model itself'}")
    _check_mode(model)
    for name, t in chain(model.named_parameters(), model.named_buffers()):
        if type(t) not in (Tensor, nn.Parameter):
            raise TypeError(f"capture: expected {name} to be a plain tensor, got a {type(t).__name__}")
        if t.is_inference():
            raise ValueError(f"capture: expected {name} to be made outside inference mode, got an inference tensor")
        if t.device != device:
            raise ValueError(f"capture: expected {name} on the examples' device {device}, got {t.device}")


_data_ptr = Tensor.data_ptr
_version = operator.attrgetter("_version")
_training = operator.itemgetter("training")


class _Watch:
    """What a graph relies on, as it was at the capture. The lists that are compared are prepared: this is every call's.

    All parameters and buffers are read where they lie, so writes to them matter only where something was folded of
    them. They and their storages are held, so that neither identity nor address can be taken over by another one.
    """

    def __init__(self, model: nn.Module, pins: Pins) -> None:
        modules = list(model.modules())
        owned = [d for module in modules for d in (module._modules, module._parameters, module._buffers)]
        self._pins, self._modules = pins, modules
        self._states = [module.__dict__ for module in modules]
        self._classes = list(map(type, modules))
        self._full, self._empty = [d for d in owned if d], [d for d in owned if not d]
        self._slots = _values(self._full)
        self._tensors = [t for t in self._slots if isinstance(t, Tensor)]
        self._storages = [t.untyped_storage() for t in self._tensors]
        self._addresses = list(map(_data_ptr, self._tensors))
        self._sources = list({id(t): t for t in pins.sources}.values())
        self._versions = list(map(_version, self._sources))

    def change(self) -> str | None:
        """What of the model has changed since."""
        if self._pins.void:
            return "train(), eval() or refresh() was called, or a fused optimizer has made a step"
        if any(map(_training, self._states)):
            return "a module is in training mode"
        slots = _values(self._full)
        if any(self._empty) or len(slots) != len(self._slots) or not all(map(operator.is_, slots, self._slots)):
            return "a module, parameter or buffer was replaced"
        if list(map(type, self._modules)) != self._classes:
            return "a module has another class"
        if list(map(_data_ptr, self._tensors)) != self._addresses:
            return "a parameter or buffer was moved to other memory"
        if list(map(_version, self._sources)) != self._versions:
            return "a parameter or buffer of a fused block was written to"
        return None


def _values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))
