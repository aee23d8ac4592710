"""``batch_norm``: the finalize kernel of csrc/batch_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import backends, extension
from resnet_fused.cuda import _device


def finalize(
    count: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge tiles into ``(scale, shift, mean, rstd, var_unbiased)``, each (C,) fp32, in a fixed order.

    Args:
        count: (T,) int32; a tile of count 0 is ignored.
        mean, m2: (T, C) fp32.
        weight, bias: (C,) of any floating dtype, None for 1 and 0.
        eps: added to the biased variance.
    Raises:
        ValueError: a size is outside the kernel's bounds.
        RuntimeError: CUDA refused the launch.
    """
    kernels = extension.module
    if kernels is None:
        raise NotImplementedError(f"bn_finalize: expected the CUDA extension to be loaded, got: {extension.reason}")
    tiles, channels = mean.shape
    device = mean.device
    # The names keep converted copies alive until the kernels are enqueued; the allocator reuses memory in stream order.
    count, mean, m2 = count.contiguous(), mean.contiguous(), m2.contiguous()
    gamma, beta = _vector(weight), _vector(bias)
    scale, shift, batch_mean, rstd, var_unbiased = mean.new_empty((5, channels)).unbind()
    workspace = torch.empty(kernels.bn_finalize_workspace(tiles, channels), dtype=torch.uint8, device=device)
    tensors = (count, mean, m2, gamma, beta, scale, shift, batch_mean, rstd, var_unbiased, workspace)
    _device.run(kernels.bn_finalize, device, *tensors, tiles, channels, eps, device.index)
    return scale, shift, batch_mean, rstd, var_unbiased


def unsupported_reason(
    count: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    """Why the kernel cannot run on these arguments; None if it can."""
    if extension.module is None:
        return extension.reason
    if extension.module.emulated:
        return "this kernel is not emulated"
    if mean.dtype != torch.float32:
        return f"the kernel is written for float32 statistics, not {mean.dtype}"
    return _device.unsupported(extension.module, mean, count, m2, weight, bias)


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.detach().to(torch.float32).contiguous()


backends.register("bn_finalize", "cuda", finalize, unsupported_reason, default=False)
