"""What a row says: the same keys in ``extra_info`` whatever was measured, None where one does not apply."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from harness.protocol import Case, Result
from resnet_fused.cli.ceilings import Rates

KEYS = (
    "kind",  # kernel, block, network
    "op",
    "direction",
    "model",
    "mode",  # train, infer
    "batch",
    "shape",
    "dtype",  # bf16, fp16, fp32
    "layout",  # channels_last, nchw
    "impl",
    "bytes",  # the fewest that have to be moved
    "flops",
    "gb_per_s",  # bytes over the median time
    "tflop_per_s",
    "bound_fraction",  # the least time that the measured ceilings allow, over the median time
    "images_per_s",
    "peak_mib",  # what one call needs on top of what is held before it
    "host_us",  # in which the host enqueues one call
    "error",  # relative, against fp64
    "error_torch",  # eager PyTorch's
    "config",
)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def identity(case: Case, impl: str) -> dict[str, Any]:
    """The keys known before measuring; all others None."""
    unknown = case.info.keys() - set(KEYS)
    if unknown:
        raise ValueError(f"identity: expected keys of the rows, got {', '.join(sorted(unknown))}")
    layout = {"eager_nchw": "nchw", "onnxruntime": "nchw"}.get(impl.removesuffix("+graph"), "channels_last")
    return dict.fromkeys(KEYS) | case.info | {"impl": impl, "layout": layout}


def measured(case: Case, impl: str, result: Result, rates: Rates) -> dict[str, Any]:
    """All keys of the row of a timed implementation."""
    moved, time, info = case.traffic, statistics.median(result.samples), case.info
    return identity(case, impl) | {
        "bytes": moved.bytes,
        "flops": moved.flops,
        "error": result.error,
        "error_torch": result.error_torch,
        "config": result.config,
        "peak_mib": None if result.peak_bytes is None else result.peak_bytes / 2**20,
        "host_us": None if result.host_s is None else result.host_s * 1e6,
        "gb_per_s": moved.bytes / time / 1e9,
        "tflop_per_s": moved.flops / time / 1e12,
        "bound_fraction": case.bound_s(rates) / time,
        "images_per_s": info["batch"] / time if info["kind"] == "network" else None,
    }
