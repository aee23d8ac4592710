"""Rules that give every unit of a network its own :class:`Mixing` module: values for ``mixing=`` of the networks.

Such a value is any function of a :class:`MixingSite` that returns a fresh module, or None for the plain sum ``F + S``.
Those here are used as functions, compare equal when their arguments do, and can be pickled::

    models.cifar_resnet(110, mixing=models.mixing.exclusive_gating(bias=-6))
    models.resnet50(mixing=models.mixing.stochastic_depth(0.2))

Source: "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027), table 1; the errors are those of ResNet-110
on CIFAR-10 there, where the plain sum has 6.61%.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resnet_fused.blocks.mixing import (
    ConstantScaling,
    DropoutShortcut,
    ExclusiveGating,
    LearnedScaling,
    Mixing,
    NoShortcut,
    ShortcutGating,
    SqueezeExcitation,
    StochasticDepth,
)

__all__ = [
    "MixingRule",
    "MixingSite",
    "constant_scaling",
    "dropout_shortcut",
    "exclusive_gating",
    "learned_scaling",
    "no_shortcut",
    "shortcut_gating",
    "squeeze_excitation",
    "stochastic_depth",
]


@dataclass(frozen=True)
class MixingSite:
    """The unit that a rule gives a module to."""

    inplanes: int  # channels of its input
    outplanes: int  # channels of its sum
    stride: int
    index: int  # its place in the network, from 0
    units: int  # the number of units in the network


MixingRule = Callable[[MixingSite], Mixing | None]


@dataclass(frozen=True)
class no_shortcut:
    """``F``: a plain network without shortcuts (arXiv 1512.03385, section 4.1); above 20% error."""

    def __call__(self, site: MixingSite) -> NoShortcut:
        return NoShortcut()


@dataclass(frozen=True)
class constant_scaling:
    """``branch * F + shortcut * S``; (0.5, 0.5) has 12.35% error, (0.5, 1) above 20%."""

    shortcut: float = 0.5
    branch: float = 0.5

    def __call__(self, site: MixingSite) -> ConstantScaling:
        return ConstantScaling(self.shortcut, self.branch)


@dataclass(frozen=True)
class exclusive_gating:
    """``g(x) * F + (1 - g(x)) * S``, every ``b_g`` starts at ``bias``: -6 has 8.70% error, -7 9.81%, more above 20%."""

    bias: float = -6.0

    def __call__(self, site: MixingSite) -> ExclusiveGating:
        return ExclusiveGating(site.inplanes, site.outplanes, site.stride, self.bias)


@dataclass(frozen=True)
class shortcut_gating:
    """``F + (1 - g(x)) * S``, every ``b_g`` starts at ``bias``: -6 has 6.91% error, 0 has 12.86%."""

    bias: float = -6.0

    def __call__(self, site: MixingSite) -> ShortcutGating:
        return ShortcutGating(site.inplanes, site.outplanes, site.stride, self.bias)


@dataclass(frozen=True)
class dropout_shortcut:
    """``F + dropout(S, p)``; above 20% error at 0.5."""

    p: float = 0.5

    def __call__(self, site: MixingSite) -> DropoutShortcut:
        return DropoutShortcut(self.p)


@dataclass(frozen=True)
class stochastic_depth:
    """Drops branches with a probability that grows linearly with depth, to ``final_p`` in the last unit.

    Unit l of L, counted from 1, has ``p = final_p * l / L``; ``mode`` "batch" is the paper's, "row" draws per sample.

    Source: arXiv 1603.09382, equation 4, with ``final_p`` = 1 - p_L.
    """

    final_p: float = 0.5
    mode: str = "row"

    def __call__(self, site: MixingSite) -> StochasticDepth:
        return StochasticDepth(self.final_p * (site.index + 1) / site.units, self.mode)


@dataclass(frozen=True)
class learned_scaling:
    """``weight * F + S``, one learned weight a unit (arXiv 2003.04887) or one a channel (arXiv 2103.17239)."""

    init: float = 1.0
    per_channel: bool = False

    def __call__(self, site: MixingSite) -> LearnedScaling:
        return LearnedScaling(site.outplanes if self.per_channel else 1, self.init)


@dataclass(frozen=True)
class squeeze_excitation:
    """``g * F + S``, the gate from the branch's mean over its pixels (arXiv 1709.01507)."""

    reduction: int = 16

    def __call__(self, site: MixingSite) -> SqueezeExcitation:
        return SqueezeExcitation(site.outplanes, self.reduction)
