"""Every environment variable that the installed package reads. Those of the build are read by ``setup.py``."""

from __future__ import annotations

import functools
import os

BACKENDS = ("cuda", "triton", "aten", "reference")
"""Names of the backends, in the order in which they are preferred where the tables have no entry."""


@functools.cache
def backend() -> str:
    """``RESNET_FUSED_BACKEND`` when first asked for: the backend forced on every op, several in order, or ``"auto"``.

    Raises:
        ValueError: the variable is set to an unknown name.
    """
    return check_backend(os.environ.get("RESNET_FUSED_BACKEND", "auto"), "RESNET_FUSED_BACKEND")


def check_backend(name: str, where: str) -> str:
    """``name`` itself when it is ``"auto"``, a backend's name, or several in order with commas between them.

    Raises:
        ValueError: it is none of these; the text names ``where``.
    """
    names = name.split(",") if isinstance(name, str) else []
    if name == "auto" or (names and set(names) <= set(BACKENDS) and len(set(names)) == len(names)):
        return name
    raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}, or several with commas, got {name!r}")


@functools.cache
def plans() -> bool:
    """``RESNET_FUSED_PLANS`` when first asked for: whether what a block launches is recorded and done again (1, 0).

    Off while no GPU has run one.

    Raises:
        ValueError: the variable is neither.
    """
    value = os.environ.get("RESNET_FUSED_PLANS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"RESNET_FUSED_PLANS: expected 0 or 1, got {value!r}")
    return value == "1"


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (``TRITON_INTERPRET``, Triton's own variable)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
