"""``conv1x1`` in Triton: the ops, the choice among their forms, and what they decline.

The kernels are in ``conv1x1_<direction>.py``. Another form of each op is PyTorch's own convolution between passes of
Triton (``materialised.py``); of bprop, dgrad and wgrad one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import config, tuning
from resnet_fused.kernels import conv1x1_bprop as narrow_bprop
from resnet_fused.kernels import conv1x1_wgrad as weight_gradient
from resnet_fused.kernels import materialised
from resnet_fused.kernels._launch import SHORT, unsupported
from resnet_fused.kernels._product import Product, is_bits, product_candidates
from resnet_fused.kernels.conv1x1_dgrad import dgrad
from resnet_fused.kernels.conv1x1_fprop import forward
from resnet_fused.reference import no_statistics, output_size
from resnet_fused.tuning import Config, Materialised, ProductConfig, Separate

# --- choice -----------------------------------------------------------------------------------------------------------


def _forward_problem(ends: str, x, scale, weight, stride: int) -> Product:
    n, depth, h, w = x.shape
    rows = n * output_size(h, 1, stride, 0, 1) * output_size(w, 1, stride, 0, 1)
    reads = "plain" if scale is None else "deferred"
    return Product(rows, weight.shape[0], depth, stride, SHORT[x.dtype], reads, ends)


def _fprop_problem(x, scale, shift, slope, weight, stride, dilation, groups, statistics) -> Product:
    return _forward_problem("statistics" if statistics else "plain", x, scale, weight, stride)


def _infer_problem(x, scale, shift, slope, weight, bias, residual, stride, *rest) -> Product:
    return _forward_problem("plain" if residual is None else "residual", x, scale, weight, stride)


def _dgrad_problem(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, stride, *rest
) -> Product:
    n, depth, p, q = dz.shape
    reads = "affine" if y is not None else "plain" if sign is None else "masked"
    ends = "+".join(name for name, given in (("sums", mean), ("skip", skip)) if given is not None)
    return Product(n * p * q, x.shape[1], depth, stride, SHORT[x.dtype], reads, ends or "plain")


_PROBLEMS: dict[str, Any] = {
    "conv1x1_fprop": _fprop_problem,
    "conv1x1_infer": _infer_problem,
    "conv1x1_dgrad": _dgrad_problem,
    "conv1x1_wgrad": weight_gradient.problem,
    "conv1x1_bprop": narrow_bprop.problem,
}


def problem(op: str, *args: Any) -> Any:
    """What the configuration of a call is chosen for."""
    return _PROBLEMS[op](*args)


def candidates(problem: Any) -> tuple[Config, ...]:
    """The kernels' own, then the materialised form; both gradients at once only of narrow convolutions."""
    if isinstance(problem, Product):
        own: tuple[Config, ...] = product_candidates(problem)
    elif isinstance(problem, narrow_bprop.Problem):
        own = (*(narrow_bprop.candidates(problem) if narrow_bprop.narrow(problem) else ()), Separate())
    else:
        own = weight_gradient.candidates(problem)
    return (*own, Materialised())


def _choose(op: str, *args: Any) -> tuple[Config, Any]:
    found = problem(op, *args)
    return tuning.choose(op, found, args[0].device, candidates), found


# --- ops --------------------------------------------------------------------------------------------------------------


def conv1x1_fprop(*args: Any) -> tuple[Tensor, ...]:
    """One launch; the statistics come as one tile."""
    chosen, found = _choose("conv1x1_fprop", *args)
    if not isinstance(chosen, ProductConfig):
        return materialised.fprop(*args)
    x, scale, shift, slope, weight, stride, _, _, statistics = args
    y, *tile = forward(chosen, found, x, scale, shift, slope, weight, None, None, stride, False, None, statistics)
    return (y, *(tile if statistics else no_statistics(y)))


def conv1x1_infer(*args: Any) -> Tensor:
    """One launch."""
    chosen, found = _choose("conv1x1_infer", *args)
    if not isinstance(chosen, ProductConfig):
        return materialised.infer(*args)
    x, scale, shift, slope, weight, bias, residual, stride, _, _, relu, out_slope = args
    return forward(
        chosen, found, x, scale, shift, slope, weight, bias, residual, stride, relu, out_slope, False
    )[0]  # fmt: skip


def conv1x1_dgrad(*args: Any) -> tuple[Tensor, ...]:
    """One launch."""
    chosen, found = _choose("conv1x1_dgrad", *args)
    if not isinstance(chosen, ProductConfig):
        return materialised.dgrad(*args)
    return dgrad(chosen, found, *args)


def conv1x1_wgrad(*args: Any) -> Tensor:
    """Two launches: the split product, the sum of its parts."""
    chosen, _ = _choose("conv1x1_wgrad", *args)
    if not isinstance(chosen, ProductConfig):
        return materialised.wgrad(*args)
    return weight_gradient.wgrad(chosen, *args)


def conv1x1_bprop(*args: Any) -> tuple[Tensor, ...]:
    """Two launches for a narrow convolution, three for others."""
    chosen, found = _choose("conv1x1_bprop", *args)
    if isinstance(chosen, Materialised):
        return materialised.bprop(*args)
    if isinstance(chosen, ProductConfig):
        return narrow_bprop.bprop_narrow(chosen, found, *args)
    *operands, stride, dilation, groups, dtype = args
    dx = conv1x1_dgrad(*operands, stride, dilation, groups)
    return (*dx, conv1x1_wgrad(*operands[:11], stride, dilation, groups, dtype))


# --- what the kernels decline -----------------------------------------------------------------------------------------


def _product_unsupported(weight: Tensor, stride: int = 1) -> str | None:
    if weight.dtype == torch.bfloat16 and config.triton_interprets():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None if stride <= 2 else f"the kernel is written for strides 1 and 2, not {stride}"


def _bits_unsupported(*pairs: tuple[Tensor | None, Tensor | None]) -> str | None:
    for sign, of in pairs:
        if of is not None and is_bits(sign) and of.shape[1] % 8:
            return f"packed masks are read for channels in multiples of 8, not {of.shape[1]}"
    return None


def _fprop_unsupported(x, scale, shift, slope, weight, stride, *rest) -> str | None:
    return unsupported(x, scale, shift, slope, weight) or _product_unsupported(weight, stride)


def _infer_unsupported(x, scale, shift, slope, weight, bias, residual, stride, *rest) -> str | None:
    tensors = (x, scale, shift, slope, weight, bias, residual, rest[-1])
    return unsupported(*tensors) or _product_unsupported(weight, stride)


def _wgrad_unsupported(dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> str | None:
    tensors = (dz, sign, y, a, b, c, weight, x, scale, shift, slope)
    return unsupported(*tensors) or _product_unsupported(weight) or _bits_unsupported((sign, dz))


def _dgrad_unsupported(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, stride, *rest
) -> str | None:
    return (
        unsupported(dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign)
        or _product_unsupported(weight, stride)
        or _bits_unsupported((sign, dz), (skip_sign, skip))
    )


UNSUPPORTED: dict[str, Any] = {
    "conv1x1_fprop": _fprop_unsupported,
    "conv1x1_infer": _infer_unsupported,
    "conv1x1_dgrad": _dgrad_unsupported,
    "conv1x1_wgrad": _wgrad_unsupported,
    "conv1x1_bprop": _dgrad_unsupported,
}
