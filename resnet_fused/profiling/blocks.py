"""Tell a listener when a model's blocks run, forward and backward, without changing which path they take.

A block is an outermost fused module, or an outermost module without any fused one in it; a fused stem, which is a
method of its network and not a module, is the block ``stem``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from resnet_fused.blocks.norm_relu import FusedNorm
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.blocks.stem import FusedStem

FORWARD, BACKWARD = "forward", "backward"
STEM = "stem"
MODEL = "(model)"  # the name of a block that is the whole model


class Listener(Protocol):
    """Is told of every block that begins and ends; backward runs in a thread of autograd's on a GPU."""

    def enter(self, block: str, phase: str) -> None: ...

    def leave(self) -> None: ...


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, in the order of their registration; a stem's module is its network."""
    found: dict[str, nn.Module] = {}
    if any(isinstance(module, FusedStem) for module in model.modules()):
        found[STEM] = next(module for module in model.modules() if isinstance(module, FusedStem))
    stem_parts = {id(part) for m in model.modules() if isinstance(m, FusedStem) for part in m._stem_parts()}

    def visit(name: str, module: nn.Module) -> None:
        fused = isinstance(module, (FusedResidual, FusedNorm))
        if fused or not any(isinstance(m, (FusedResidual, FusedNorm, FusedStem)) for m in module.modules()):
            if id(module) not in stem_parts:
                found[name or MODEL] = module
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


@contextlib.contextmanager
def watched(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Within it ``listener`` is told of every block of ``model`` that runs."""
    with contextlib.ExitStack() as stack:
        for name, module in modules(model).items():
            if name == STEM and isinstance(module, FusedStem):
                stack.enter_context(_watched_stem(module, listener))
            else:
                watch = _Watch(name, listener)
                stack.callback(module.register_forward_pre_hook(watch.before).remove)
                stack.callback(module.register_forward_hook(watch.after).remove)
        yield


@contextlib.contextmanager
def _watched_stem(network: Any, listener: Listener) -> Iterator[None]:
    # The hooks of its convolution, norm and pool would make it decline.
    watch, original = _Watch(STEM, listener), network._fused_stem

    def stem(x: Any) -> Any:
        watch.before(network, (x,))
        out = original(x)
        watch.after(network, (x,), out)
        return out

    vars(network)["_fused_stem"] = stem
    try:
        yield
    finally:
        del vars(network)["_fused_stem"]


class _Watch:
    """Hooks of one block: around its forward, and around every node of autograd's graph that the forward made."""

    def __init__(self, name: str, listener: Listener) -> None:
        self._name, self._listener = name, listener
        self._boundary: set[Any] = set()

    def before(self, module: nn.Module, inputs: Any) -> None:
        self._boundary = {t.grad_fn for t in _tensors(inputs)}
        self._listener.enter(self._name, FORWARD)

    def after(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._listener.leave()
        for node in _nodes([t.grad_fn for t in _tensors(outputs)], self._boundary):
            node.register_prehook(self._enter)
            node.register_hook(self._leave)
        self._boundary = set()

    def _enter(self, gradients: Any) -> None:
        self._listener.enter(self._name, BACKWARD)

    def _leave(self, results: Any, gradients: Any) -> None:
        self._listener.leave()


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _nodes(roots: list[Any], boundary: set[Any]) -> list[Any]:
    """The nodes between ``roots`` and ``boundary``; parameters' accumulation, which outlives the graph, is left out."""
    found: list[Any] = []
    seen = {None, *boundary}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in seen or node.name().endswith("AccumulateGrad"):
            continue
        seen.add(node)
        found.append(node)
        pending += [parent for parent, _ in node.next_functions]
    return found
