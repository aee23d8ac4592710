"""What every kernel of the extension asks of the machine and of its tensors' devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fused import extension, plans


def run(function: Callable[..., None], device: torch.device, *args: Any) -> None:
    """``function`` of the extension with tensors' addresses in their place (0 for None), the current stream last."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    function(*(a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args), stream)
    recorder = plans.recorder()
    if recorder is not None:
        recorder.launch(function, *(0 if a is None else a for a in args), plans.STREAM)


def unsupported(kernels: ModuleType, *tensors: Tensor | None) -> str | None:
    """Why the extension's kernels cannot read these tensors; None if they can.

    Kernels that are emulated (``kernels.emulated``) read the CPU's.
    """
    given = [t for t in tensors if t is not None]
    if kernels.emulated:
        away = next((t.device for t in given if not t.is_cpu), None)
        return None if away is None else f"the emulated kernel reads the CPU's memory, and an argument is on {away}"
    away = next((t.device for t in given if not t.is_cuda or t.device != given[0].device), None)
    if away is not None:
        return f"the kernel reads one CUDA device only, and an argument is on {away}"
    return _no_image(kernels, given[0].device.index)


@functools.cache
def _no_image(kernels: ModuleType, device: int) -> str | None:
    """CUDA's text where the extension was built for other architectures."""
    reason = kernels.bn_finalize_unsupported(device)
    if reason is None:
        return None
    built = ", ".join(extension.build_info().get("archs", ()))
    return f"the extension, built for {built}, does not run on cuda:{device}: {reason}"
