"""``conv3x3`` for Triton: the materialised form, in which Triton has the passes and cuDNN the convolution."""

from __future__ import annotations

from typing import Any

from resnet_fused.kernels import materialised
from resnet_fused.kernels.materialised import bprop, dgrad, fprop, infer, wgrad
from resnet_fused.tuning import Materialised
from resnet_fused.tuning.problems import Convolution, convolution


def problem(op: str, *args: Any) -> Convolution:
    """The key of a call in the tables."""
    return convolution(op, *args)


def candidates(problem: Convolution) -> tuple[Materialised, ...]:
    """One: what is left to choose is whether it beats another backend."""
    return (Materialised(),)


conv3x3_fprop, conv3x3_infer, conv3x3_dgrad, conv3x3_wgrad, conv3x3_bprop = fprop, infer, dgrad, wgrad, bprop
UNSUPPORTED = {f"conv3x3_{direction}": predicate for direction, predicate in materialised.UNSUPPORTED.items()}
