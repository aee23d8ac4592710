"""How a unit's branch F and shortcut S become its sum: constants, gates and random factors, as modules.

All of them are one formula, ``(b + b' * gate) * F + (s + s' * gate) * S`` with four constants (:class:`Mix`) and one
tensor that broadcasts against the sum, which the fused block end computes in the pass that adds. Each module's
``forward`` is the same in stock PyTorch.

Sources: "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027), section 3 and table 1; stochastic depth
arXiv 1603.09382; squeeze-and-excitation arXiv 1709.01507.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.operands import Mix

__all__ = [
    "ConstantScaling",
    "DropoutShortcut",
    "ExclusiveGating",
    "LearnedScaling",
    "Mixing",
    "NoShortcut",
    "ShortcutGating",
    "SqueezeExcitation",
    "StochasticDepth",
]


def _definer(cls: type, *names: str) -> type:
    """The most derived class that defines one of ``names``."""
    return next(each for each in cls.__mro__ if any(name in each.__dict__ for name in names))


class Mixing(nn.Module):
    """Base of the rules; a unit that is given none is the plain sum ``F + S``.

    A rule of one's own defines ``forward`` and, for the fused path, ``mix`` and ``gate`` as the same formula.
    """

    has_shortcut = True  # whether the sum has a shortcut at all
    reads_branch = False  # whether the gate is computed from the branch
    agrees = True  # whether the class that says what forward computes also says it as constants and gate

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.agrees = _definer(cls, "forward") is _definer(cls, "mix", "gate", "has_shortcut", "reads_branch")

    def mix(self) -> Mix:
        """The four constants."""
        return Mix()

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        """The gate from the unit's input ``x``.

        ``total`` is a tensor of the shortcut's (hence the sum's) shape, dtype, device and strides, whose values do not
        matter. Rules with ``reads_branch`` get the branch's mean over its pixels (N, C, 1, 1) as ``x``.
        """
        return None

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        """The sum (N, C, H, W) of a unit with input ``x``."""
        return branch + shortcut


class NoShortcut(Mixing):
    """``F``: a plain network, for the degradation experiment of arXiv 1512.03385."""

    has_shortcut = False

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch


class ConstantScaling(Mixing):
    """``branch * F + shortcut * S`` with two constants (arXiv 1603.05027, fig. 2b)."""

    def __init__(self, shortcut: float = 1.0, branch: float = 1.0) -> None:
        super().__init__()
        for name, value in (("shortcut", shortcut), ("branch", branch)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise ValueError(f"ConstantScaling: expected {name} to be a number, got {value!r}")
        self.shortcut, self.branch = float(shortcut), float(branch)

    def mix(self) -> Mix:
        return Mix(branch=self.branch, shortcut=self.shortcut)

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        return self.branch * branch + self.shortcut * shortcut

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut:g}, branch={self.branch:g}"


class _Gating(Mixing):
    """A gate ``g(x) = sigmoid(W x + b)``, a 1x1 convolution of the unit's input.

    Args:
        inplanes, outplanes: channels of the unit's input and of its sum.
        stride: of the unit.
        bias: initial value of every ``b``; the paper tries 0 to -10 and finds -6 and -7 best.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1, bias: float = -6.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inplanes, outplanes, 1, stride)
        nn.init.constant_(self.conv.bias, bias)  # type: ignore[arg-type]

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        return torch.sigmoid(self.conv(x))


class ExclusiveGating(_Gating):
    """``g(x) * F + (1 - g(x)) * S`` (arXiv 1603.05027, fig. 2c); arguments of :class:`_Gating`."""

    def mix(self) -> Mix:
        return Mix(branch=0.0, branch_gate=1.0, shortcut=1.0, shortcut_gate=-1.0)

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv(x))
        return gate * branch + (1 - gate) * shortcut


class ShortcutGating(_Gating):
    """``F + (1 - g(x)) * S`` (arXiv 1603.05027, fig. 2d); arguments of :class:`_Gating`."""

    def mix(self) -> Mix:
        return Mix(shortcut=1.0, shortcut_gate=-1.0)

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv(x))
        return branch + (1 - gate) * shortcut


class DropoutShortcut(Mixing):
    """``F + dropout(S, p)`` (arXiv 1603.05027, fig. 2f)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = _probability("DropoutShortcut", p)

    def mix(self) -> Mix:
        dropping = self.training and self.p > 0
        return Mix(shortcut=0.0, shortcut_gate=1.0) if dropping else Mix()

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        return F.dropout(torch.ones_like(total), self.p) if self.training and self.p > 0 else None

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + F.dropout(shortcut, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class StochasticDepth(Mixing):
    """``d * F + S``: in training ``d`` is 0 with probability ``p``, else ``1 / (1 - p)`` (arXiv 1603.09382).

    Args:
        p: probability of dropping the branch.
        mode: "row" draws one ``d`` a sample, "batch" one a batch, as ``torchvision.ops.StochasticDepth``.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if mode not in ("row", "batch"):
            raise ValueError(f"StochasticDepth: expected mode to be 'row' or 'batch', got {mode!r}")
        self.p, self.mode = _probability("StochasticDepth", p), mode

    def mix(self) -> Mix:
        dropping = self.training and self.p > 0
        return Mix(branch=0.0, branch_gate=1.0) if dropping else Mix()

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        return self._factor(total) if self.training and self.p > 0 else None

    def _factor(self, total: Tensor) -> Tensor:
        survival = 1.0 - self.p
        factor = torch.empty(
            [total.shape[0] if self.mode == "row" else 1, 1, 1, 1], dtype=total.dtype, device=total.device
        )
        factor.bernoulli_(survival)
        return factor.div_(survival) if survival > 0 else factor

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        if self.training and self.p > 0:
            branch = branch * self._factor(branch)
        return branch + shortcut

    def extra_repr(self) -> str:
        return f"p={self.p:g}, mode={self.mode!r}"


class LearnedScaling(Mixing):
    """``weight * F + S`` with a learned factor for the branch, one or one a channel (arXiv 2003.04887, 2103.17239).

    Args:
        channels: 1, or the channels of the sum.
        init: initial value.
    """

    def __init__(self, channels: int = 1, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(init)))

    def mix(self) -> Mix:
        return Mix(branch=0.0, branch_gate=1.0)

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        return self.weight.view(1, -1, 1, 1)

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        return self.weight.view(1, -1, 1, 1).to(branch.dtype) * branch + shortcut

    def extra_repr(self) -> str:
        return f"channels={self.weight.numel()}"


class SqueezeExcitation(Mixing):
    """``g * F + S`` with ``g = sigmoid(fc2(relu(fc1(mean of F over its pixels))))`` (arXiv 1709.01507, fig. 3).

    Args:
        channels: of the sum.
        reduction: ``fc1`` has ``channels // reduction`` outputs, at least one.
    """

    reads_branch = True

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"SqueezeExcitation: expected reduction to be at least 1, got {reduction}")
        squeezed = max(channels // reduction, 1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def mix(self) -> Mix:
        return Mix(branch=0.0, branch_gate=1.0)

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x))))

    def forward(self, x: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
        pooled = branch.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled)))) * branch + shortcut


def _probability(owner: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"{owner}: expected p to be a probability from 0 to 1, got {p!r}")
    return float(p)
