"""Which configuration a kernel takes: forced, else measured on this GPU (`tables/`), else its first candidate."""

from __future__ import annotations

from resnet_fused.tuning.choice import Candidates, Problem, asked, choose, contested, fitting, loses, measured, use
from resnet_fused.tuning.configs import Config, ConvConfig, Materialised, ProductConfig, RowsConfig, Separate

__all__ = [
    "Candidates",
    "Config",
    "ConvConfig",
    "Materialised",
    "Problem",
    "ProductConfig",
    "RowsConfig",
    "Separate",
    "asked",
    "choose",
    "contested",
    "fitting",
    "loses",
    "measured",
    "use",
]
