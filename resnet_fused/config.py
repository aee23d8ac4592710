"""Every environment variable that the installed package reads. Those of the build are read by ``setup.py``."""

from __future__ import annotations

import functools
import os

BACKENDS = ("cuda", "triton", "aten", "reference")
"""Names of the backends, in the order in which they are preferred where the tables have no entry."""


@functools.cache
def backend() -> str:
    """``RESNET_FUSED_BACKEND`` when first asked for: the backend forced on every op, or ``"auto"``.

    Raises:
        ValueError: the variable is set to an unknown name.
    """
    return check_backend(os.environ.get("RESNET_FUSED_BACKEND", "auto"), "RESNET_FUSED_BACKEND")


def check_backend(name: str, where: str) -> str:
    """``name`` itself when it is ``"auto"`` or a backend's name; a ValueError that names ``where`` otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (``TRITON_INTERPRET``, Triton's own variable)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
