"""``batch_norm``: from tile statistics to ``scale`` and ``shift``, and from the two sums to ``dy``'s coefficients.

Batch norm of Ioffe & Szegedy (arXiv 1502.03167); per-tile moments merged as Chan, Golub & LeVeque do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Norm, TileStatistics
from resnet_fused.ops import _check
from resnet_fused.ops._op import Op

# --- statistics -----------------------------------------------------------------------------------------------------


def _check_statistics(y: Tensor) -> None:
    _check.activation("bn_statistics", "y", y)


def _fake_statistics(y: Tensor):
    mean = y.new_empty((1, y.shape[1]), dtype=reference.compute_dtype(y.dtype))
    return y.new_empty((1,), dtype=torch.int32), mean, torch.empty_like(mean)


_statistics = Op("bn_statistics(Tensor y) -> (Tensor, Tensor, Tensor)", _check_statistics, _fake_statistics)


def statistics(y: Tensor) -> TileStatistics:
    """``y.mean((0, 2, 3))`` and ``y.var((0, 2, 3), unbiased=False) * M`` of a tensor that no op of ours wrote."""
    return TileStatistics(*_statistics(y))


# --- merge and finalize ---------------------------------------------------------------------------------------------


def _check_tiles(op: str, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    if mean.dim() != 2 or mean.dtype not in (torch.float32, torch.float64):
        _check.fail(
            op, "mean", "of shape (T, C) and dtype float32 or float64", f"shape {tuple(mean.shape)}, {mean.dtype}"
        )
    _check.count(op, count, mean)
    if count.dim() != 1 or count.shape[0] != mean.shape[0]:
        _check.fail(op, "count", f"of shape ({mean.shape[0]},)", f"shape {tuple(count.shape)}")
    _check.same(op, "m2", m2, "mean", mean)


def _check_merge(count: Tensor, mean: Tensor, m2: Tensor) -> None:
    _check_tiles("bn_merge", count, mean, m2)


def _fake_merge(count: Tensor, mean: Tensor, m2: Tensor):
    merged = mean.new_empty((1, mean.shape[1]))
    return count.new_empty((1,)), merged, torch.empty_like(merged)


def _check_finalize(count, mean, m2, weight, bias, eps) -> None:
    op = "bn_finalize"
    _check_tiles(op, count, mean, m2)
    _check.parameters(op, mean, weight=weight, bias=bias)
    if not eps >= 0:
        _check.fail(op, "eps", ">= 0", eps)


def _fake_finalize(count, mean, m2, weight, bias, eps):
    return tuple(mean.new_empty(mean.shape[1:]) for _ in range(5))


_merge = Op("bn_merge(Tensor count, Tensor mean, Tensor m2) -> (Tensor, Tensor, Tensor)", _check_merge, _fake_merge)
_finalize = Op(
    "bn_finalize(Tensor count, Tensor mean, Tensor m2, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_finalize,
    _fake_finalize,
)


def merge(tiles: TileStatistics) -> TileStatistics:
    """All tiles as one: what a rank sends to the others."""
    return TileStatistics(*_merge(*tiles))


def finalize(tiles: TileStatistics, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Norm, Tensor]:
    """The norm of the merged tiles, and the unbiased variance for the running estimate.

    Args:
        tiles: counts (T,), means and M2 (T, C).
        weight, bias: (C,) of any floating dtype, None for 1 and 0.
        eps: added to the biased variance.
    Raises:
        ValueError, TypeError: an argument is outside the contract.
    """
    scale, shift, mean, rstd, var = _finalize(*tiles, weight, bias, eps)
    return Norm(scale, shift, mean, rstd), var


def frozen(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype
) -> Norm:
    """The norm of running statistics, in ``dtype`` (fp32 or fp64)."""
    mean = mean.to(dtype)
    rstd = torch.rsqrt(var.to(dtype) + eps)
    return Norm(*reference.scale_and_shift(mean, rstd, weight, bias), mean, rstd)


# --- backward -------------------------------------------------------------------------------------------------------


def _check_coefficients(dbeta, dgamma, weight, mean, rstd, count) -> None:
    op = "bn_coefficients"
    _check.channels(op, mean, mean.shape[0], dbeta=dbeta, dgamma=dgamma, rstd=rstd)
    _check.parameters(op, mean, weight=weight)
    _check.count(op, count, mean)


def _fake_coefficients(dbeta, dgamma, weight, mean, rstd, count):
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


_coefficients = Op(
    "bn_coefficients(Tensor dbeta, Tensor dgamma, Tensor? weight, Tensor mean, Tensor rstd, Tensor count)"
    " -> (Tensor, Tensor, Tensor)",
    _check_coefficients,
    _fake_coefficients,
)


def coefficients(
    dbeta: Tensor, dgamma: Tensor, weight: Tensor | None, norm: Norm, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(a, b, c)`` of ``dy = a * dz + b * y + c`` under batch statistics.

    ``a = gamma * rstd``, ``b = -a * rstd * dgamma / M``, ``c = a * (mean * rstd * dgamma - dbeta) / M`` with
    ``M = sum(count)``. All vectors (C,); ``count`` (T,) int32.
    """
    return _coefficients(dbeta, dgamma, weight, norm.mean, norm.rstd, count)


for _name in ("bn_statistics", "bn_merge", "bn_finalize", "bn_coefficients"):
    backends.register(_name, "reference", getattr(reference, _name))
