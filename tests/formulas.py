"""Residual units, shortcut rules and the PReLU block, written from the papers in PyTorch's functions.

Nothing here calls the package. Every tensor is looked up by its name in a block's state_dict, batch norms included, and
what they would write into it is handed back beside the result. Random factors are drawn from the global generator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

State = Mapping[str, Tensor]


class Norms:
    """The batch norms of a state: those in ``batch`` take the batch's statistics, the others their running ones."""

    def __init__(self, state: State, batch: Collection[str]) -> None:
        self.state, self.batch = state, batch
        self.moved: dict[str, Tensor] = {}  # the buffers that a call has written, by name

    def __call__(self, name: str, y: Tensor) -> Tensor:
        running = [self.state[f"{name}.running_{what}"].clone() for what in ("mean", "var")]
        affine = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        out = F.batch_norm(y, *running, *affine, training=name in self.batch, momentum=0.1, eps=1e-5)
        if name in self.batch:
            counter = f"{name}.num_batches_tracked"
            self.moved |= {f"{name}.running_mean": running[0], f"{name}.running_var": running[1]}
            self.moved[counter] = self.state[counter] + 1
        return out


# --- how branch and shortcut become the sum ---------------------------------------------------------------------------


def _gate(state: State, x: Tensor, stride: int) -> Tensor:
    """``g(x) = sigmoid(W_g x + b_g)``."""
    return torch.sigmoid(F.conv2d(x, state["mixing.conv.weight"], state["mixing.conv.bias"], stride))


def _bernoulli(shape: tuple[int, ...], survival: float, like: Tensor) -> Tensor:
    factor = torch.empty(shape, dtype=like.dtype).bernoulli_(survival)
    return factor / survival if survival > 0 else factor


def _squeeze(state: State, branch: Tensor) -> Tensor:
    """``sigmoid(W_2 relu(W_1 mean(F)))`` as two matrix products."""
    h = branch.mean((2, 3))
    for layer, act in (("fc1", F.relu), ("fc2", torch.sigmoid)):
        h = act(F.linear(h, state[f"mixing.{layer}.weight"].flatten(1), state[f"mixing.{layer}.bias"]))
    return h[:, :, None, None]


def mixed(
    rule: tuple, state: State, x: Tensor, branch: Tensor, shortcut: Tensor, stride: int, training: bool
) -> Tensor:
    """The sum of a unit with input ``x``; ``rule`` is a name and its numbers."""
    name, *numbers = rule
    if name == "sum":
        return branch + shortcut
    if name == "none":
        return branch
    if name == "scaling":
        return numbers[0] * branch + numbers[1] * shortcut
    if name == "exclusive":
        g = _gate(state, x, stride)
        return g * branch + (1 - g) * shortcut
    if name == "shortcut-gate":
        return branch + (1 - _gate(state, x, stride)) * shortcut
    if name == "learned":
        return branch * state["mixing.weight"].reshape(-1, 1, 1) + shortcut
    if name == "squeeze":
        return branch * _squeeze(state, branch) + shortcut
    if name in ("dropout", "depth-row", "depth-batch"):
        p = numbers[0]
        if not training or p == 0:
            return branch + shortcut
        if name == "dropout":
            return branch + shortcut * F.dropout(torch.ones(branch.shape, dtype=branch.dtype), p)
        rows = branch.shape[0] if name == "depth-row" else 1
        return branch * _bernoulli((rows, 1, 1, 1), 1 - p, branch) + shortcut
    raise ValueError(f"no rule {name}")


def _shortcut(option: str, state: State, norms: Norms, x: Tensor, h: Tensor, channels: int, stride: int) -> Tensor:
    """Identity, option A, a projection with its norm (B and C), or a 1x1 convolution alone; ``h`` is activated."""
    if option == "identity":
        return x
    if option == "A":
        kept = h[:, :, ::stride, ::stride]
        zeros = kept.new_zeros(kept.shape[0], channels - kept.shape[1], *kept.shape[2:])
        return torch.cat([kept, zeros], 1)
    if option == "projection":
        return norms("downsample.1", F.conv2d(h, state["downsample.0.weight"], stride=stride))
    if option == "conv":
        return F.conv2d(h, state["downsample.weight"], state["downsample.bias"], stride)
    raise ValueError(f"no shortcut {option}")


# --- the five units of arXiv 1603.05027, Fig. 4 -----------------------------------------------------------------------


def unit_formula(
    unit: str,
    state: State,
    x: Tensor,
    *,
    batch: Collection[str],
    training: bool = True,
    shortcut: str = "identity",
    rule: tuple = ("sum",),
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    preactivate: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A basic or bottleneck unit's output, and the buffers that it writes.

    ``state`` decides by its convolutions whether the unit is a basic one or a bottleneck; ``batch`` names the norms in
    training, ``training`` says whether random factors are drawn. Without ``preactivate`` a unit of (d) or (e) takes its
    input as activated already.
    """
    norms = Norms(state, batch)
    basic = "conv3.weight" not in state

    def conv(i: int, t: Tensor) -> Tensor:
        weight = state[f"conv{i}.weight"]
        if weight.shape[2] == 1:
            return F.conv2d(t, weight)
        strided = i == (1 if basic else 2)
        return F.conv2d(t, weight, None, stride if strided else 1, dilation, dilation, 1 if basic else groups)

    def bn(i: int, t: Tensor) -> Tensor:
        return norms(f"bn{i}", t)

    def add(branch: Tensor, h: Tensor) -> Tensor:
        added = _shortcut(shortcut, state, norms, x, h, branch.shape[1], stride)
        return mixed(rule, state, x, branch, added, stride, training)

    relu = F.relu
    if unit == "original":
        f = bn(2, conv(2, relu(bn(1, conv(1, x)))))
        f = f if basic else bn(3, conv(3, relu(f)))
        return relu(add(f, x)), norms.moved
    if unit == "bn_after_add":
        f = conv(2, relu(bn(1, conv(1, x))))
        f = f if basic else conv(3, relu(bn(2, f)))
        return relu(bn(2 if basic else 3, add(f, x))), norms.moved
    if unit == "relu_before_add":
        f = relu(bn(2, conv(2, relu(bn(1, conv(1, x))))))
        f = f if basic else relu(bn(3, conv(3, f)))
        return add(f, x), norms.moved
    if unit == "relu_preact":
        h = relu(x) if preactivate else x
        f = bn(2, conv(2, relu(bn(1, conv(1, h)))))
        f = f if basic else bn(3, conv(3, relu(f)))
        return add(f, h), norms.moved
    if unit == "full_preact":
        h = relu(bn(1, x)) if preactivate else x
        f = conv(2, relu(bn(2, conv(1, h))))
        f = f if basic else conv(3, relu(bn(3, f)))
        return add(f, h), norms.moved
    raise ValueError(f"no unit {unit}")


# --- PReLU ------------------------------------------------------------------------------------------------------------


def prelu_formula(
    state: State, x: Tensor, *, batch: Collection[str], final_activation: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """``conv BN PReLU conv BN add`` and, with ``final_activation``, PReLU; and the buffers that it writes."""
    norms = Norms(state, batch)
    slope = state["prelu.weight"]
    h = norms("bn1", F.conv2d(x, state["conv1.weight"], state.get("conv1.bias"), padding=1))
    h = norms("bn2", F.conv2d(F.prelu(h, slope), state["conv2.weight"], state.get("conv2.bias"), padding=1))
    return (F.prelu(x + h, slope) if final_activation else x + h), norms.moved
