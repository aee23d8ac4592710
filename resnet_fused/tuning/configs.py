"""The configurations that kernels are compiled for: frozen records that serve as keys, table entries and test ids."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RowsConfig:
    """Of a kernel that walks over the rows of a (M, C) matrix.

    A tile is a part of one thread's 16-byte accesses times its warps; several programs on a multiprocessor keep enough
    loads in flight to reach the memory's bandwidth.
    """

    rows: int  # of a tile
    channels: int  # of a tile at most; a narrower tensor takes the next power of two
    warps: int  # of a program
    programs: int  # on each multiprocessor
    shared: int = 96  # KiB of shared memory that a program needs at most; GPUs that have less are not offered it


@dataclass(frozen=True)
class ProductConfig:
    """Of a matrix product (M, K) x (K, N), tiles walked over by as many programs as run at once."""

    m: int  # rows of the result's tile
    n: int  # columns of the result's tile
    k: int  # depth of one step
    warps: int
    stages: int  # of the software pipeline
    programs: int = 1  # on each multiprocessor
    descriptors: bool = False  # tiles through tensor descriptors (the bulk copy engine from sm_90 on), else by pointers
    shared: int = 96  # KiB of shared memory that a program needs at most; GPUs that have less are not offered it
    since: int = 80  # least compute capability, 90 for 9.0, that it is offered to: older ones would spill registers
    until: int = 999  # greatest one


@dataclass(frozen=True)
class Materialised:
    """Of a convolution: its operands written by Triton's passes, the convolution left to cuDNN."""

    shared: int = 96


@dataclass(frozen=True)
class ConvConfig:
    """Of a 3x3 convolution in CUDA C++."""

    chip: str  # whose instructions: "portable", "hopper"
    rows: int  # of a tile: pixels
    columns: int  # of a tile: channels
    feed: str  # "halo": one block of pixels in shared memory for several taps; "im2col": one for each
    shared: int = 0  # the extension knows what it needs


@dataclass(frozen=True)
class Separate:
    """Of both gradients of a convolution: one after the other, each with its own configuration."""

    shared: int = 0


Config = RowsConfig | ProductConfig | Materialised | ConvConfig | Separate
_KINDS: dict[str, type[Config]] = {
    "rows": RowsConfig,
    "product": ProductConfig,
    "materialised": Materialised,
    "conv": ConvConfig,
    "separate": Separate,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(config: Config) -> dict[str, Any]:
    """The entry of a table."""
    return {"kind": _NAMES[type(config)], **asdict(config)}


def from_json(entry: Any) -> Config:
    """The inverse of :func:`to_json`.

    Raises:
        ValueError: ``entry`` is no configuration that this version knows.
    """
    if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
        raise ValueError(f"expected a configuration of kind {', '.join(_KINDS)}, got {entry!r}")
    fields = {key: value for key, value in entry.items() if key != "kind"}
    try:
        return _KINDS[entry["kind"]](**fields)
    except TypeError as error:
        raise ValueError(f"expected the fields of a {entry['kind']} configuration, got {fields}") from error


def runs_on(config: Config, capability: int, shared_kib: float) -> bool:
    """Whether a GPU of this compute capability (90 for 9.0), whose programs may have so much memory, is offered it."""
    if isinstance(config, ProductConfig):
        least = max(config.since, 90 if config.descriptors else 80)
        if not least <= capability <= config.until:
            return False
    return config.shared <= shared_kib


_LIMITS = ("shared", "since", "until")


def label(config: Config) -> str:
    """A short name: ``product m=128 n=64 k=64 warps=4 stages=3``."""
    fields = {key: value for key, value in asdict(config).items() if key not in _LIMITS}
    told = (f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in fields.items())
    return " ".join((_NAMES[type(config)], *told))
