"""``batch_norm``: statistics with the kernel that PyTorch's own batch norm uses, the rest in few small kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.aten.pointwise import moments


def statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and M2 of ``y`` as one tile."""
    if y.numel() == 0:  # PyTorch's kernel refuses it
        return reference.bn_statistics(y)
    m = y.numel() // y.shape[1]
    mean, var = moments(y)
    return torch.full((1,), m, dtype=torch.int32, device=y.device), mean.unsqueeze(0), (var * m).unsqueeze(0)


def finalize(count, mean, m2, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One tile's norm and unbiased variance; merging and parameters of other dtypes are left to the reference."""
    if mean.shape[0] != 1 or any(v is not None and v.dtype != mean.dtype for v in (weight, bias)):
        return reference.bn_finalize(count, mean, m2, weight, bias, eps)
    mean, m2 = mean[0], m2[0]
    rstd = (m2 / count).add_(eps).rsqrt_()
    scale = rstd.clone() if weight is None else weight * rstd
    shift = (mean * scale).neg_() if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift, mean.clone(), rstd, m2 / (count - 1)


def coefficients(dbeta, dgamma, weight, mean, rstd, count) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, with the common factor ``rstd * dgamma / M`` taken once."""
    n = count if count.shape[0] == 1 else count.sum()
    a = rstd.clone() if weight is None else (weight * rstd).to(rstd.dtype)
    factor = (rstd * dgamma).div_(n)
    return a, (a * factor).neg_(), torch.addcmul(dbeta / -n, mean, factor).mul_(a)


backends.register("bn_finalize", "aten", finalize)
backends.register("bn_coefficients", "aten", coefficients)
backends.register("bn_statistics", "aten", statistics)
backends.register("bn_merge", "aten", reference.bn_merge)
