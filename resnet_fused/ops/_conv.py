"""The contract that ``conv1x1`` and ``conv3x3`` share: five ops each, defined once and registered under both stems.

========  ======================================================================================================
fprop     ``y = conv2d(x or relu(x * scale + shift), weight)``, and per-tile statistics of the rounded ``y``
infer     ``relu(conv2d(x, weight) + bias + residual)``
dgrad     gradient of the input, from ``dy = a * dz' + b * y + c``; plain input: plus the masked skip gradient; deferred
          input: through its ReLU, with the two sums of its batch norm
wgrad     gradient of the weight, both operands formed on the way
bprop     dgrad and wgrad together, for a backend that forms ``dy`` once
========  ======================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Conv, Deferred, Gradient, Norm, TileStatistics
from resnet_fused.ops import _check
from resnet_fused.ops._op import Op, empty_channels_last

_GEOMETRY = "int stride, int dilation, int groups"
_GRADIENT = "Tensor dz, Tensor? sign, Tensor? y, Tensor? a, Tensor? b, Tensor? c"
_INPUT = "Tensor x, Tensor? scale, Tensor? shift"
_EPILOGUE = "Tensor? mean, Tensor? rstd, Tensor? skip, Tensor? skip_sign"


def output_size(size: Any, kernel: int, stride: int, dilation: int) -> Any:
    """Height or width of the output for padding ``dilation * (kernel - 1) // 2``."""
    padding = dilation * (kernel - 1) // 2
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class ConvOps:
    """The five ops of one kernel size.

    Args:
        stem: name of the ops, ``conv1x1`` or ``conv3x3``.
        kernel: 1 or 3.
    """

    def __init__(self, stem: str, kernel: int) -> None:
        self.stem, self.kernel = stem, kernel
        self._fprop = Op(
            f"{stem}_fprop({_INPUT}, Tensor weight, {_GEOMETRY}, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)",
            self._check_fprop,
            self._fake_fprop,
        )
        self._infer = Op(
            f"{stem}_infer(Tensor x, Tensor weight, Tensor bias, Tensor? residual, {_GEOMETRY}, bool relu) -> Tensor",
            self._check_infer,
            self._fake_infer,
        )
        self._dgrad = Op(
            f"{stem}_dgrad({_GRADIENT}, Tensor weight, {_INPUT}, {_EPILOGUE}, {_GEOMETRY}) -> (Tensor, Tensor, Tensor)",
            self._check_dgrad,
            self._fake_dgrad,
        )
        self._wgrad = Op(
            f"{stem}_wgrad({_GRADIENT}, Tensor weight, {_INPUT}, {_GEOMETRY}, ScalarType dtype) -> Tensor",
            self._check_wgrad,
            self._fake_wgrad,
        )
        self._bprop = Op(
            f"{stem}_bprop({_GRADIENT}, Tensor weight, {_INPUT}, {_EPILOGUE}, {_GEOMETRY}, ScalarType dtype)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            self._check_bprop,
            self._fake_bprop,
        )
        for direction in ("fprop", "infer", "dgrad", "wgrad", "bprop"):
            backends.register(f"{stem}_{direction}", "reference", getattr(reference, f"conv_{direction}"))

    # --- what autograd functions and blocks call -----------------------------------------------------------------

    def fprop(
        self, x: Tensor | Deferred, weight: Tensor, conv: Conv, *, statistics: bool
    ) -> tuple[Tensor, TileStatistics]:
        """``y = conv2d(x, weight)`` with the statistics of ``y`` (of no tile unless asked for).

        Args:
            x: (N, C, H, W), plain or deferred.
            weight: (K, C / groups, R, R), dtype of ``x``.
        Returns:
            ``y`` (N, K, P, Q) channels_last, and its :class:`TileStatistics`.
        Raises:
            ValueError, TypeError: an argument is outside the contract.
        """
        y, *tiles = self._fprop(*_flat(x), weight, *conv, statistics)
        return y, TileStatistics(*tiles)

    def infer(
        self, x: Tensor, weight: Tensor, bias: Tensor, conv: Conv, *, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        """``relu(conv2d(x, weight) + bias + residual)``; ``bias`` (K,) fp32 (fp64), ``residual`` like the result."""
        return self._infer(x, weight, bias, residual, *conv, relu)

    def bind(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        conv: Conv,
        *,
        residual: Tensor | None,
        relu: bool,
        overwrite_residual: bool = False,
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """:meth:`infer` as a function of ``x`` and ``residual``, the choices and preparations made once.

        It serves inputs of the same shape, dtype, device and memory format as these. With ``overwrite_residual`` the
        result may be written over ``residual``.
        """
        bound = self._infer.bind(x, weight, bias, residual, *conv, relu, overwrite_residual=overwrite_residual)
        return bound if bound is not None else lambda x, r: self._infer(x, weight, bias, r, *conv, relu)

    def dgrad(
        self,
        grad: Gradient,
        weight: Tensor,
        x: Tensor | Deferred,
        norm: Norm | None,
        conv: Conv,
        *,
        skip: Gradient | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dx, dbeta, dgamma)``; for a deferred ``x``, ``dx`` is the gradient of ``y * scale + shift``.

        Without ``norm`` the sums are empty. ``skip``, for a plain ``x`` alone: its masked ``dz`` is added to ``dx``.
        """
        return self._dgrad(*grad, weight, *_flat(x), *_statistics(norm), *_skip(skip), *conv)

    def wgrad(self, grad: Gradient, weight: Tensor, x: Tensor | Deferred, conv: Conv, *, dtype: torch.dtype) -> Tensor:
        """Gradient of the weight, shape and strides of ``weight``, in ``dtype``."""
        return self._wgrad(*grad, weight, *_flat(x), *conv, dtype)

    def bprop(
        self,
        grad: Gradient,
        weight: Tensor,
        x: Tensor | Deferred,
        norm: Norm | None,
        conv: Conv,
        *,
        dtype: torch.dtype,
        skip: Gradient | None = None,
        consume: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dbeta, dgamma, dw)``, see :meth:`dgrad` and :meth:`wgrad`.

        With ``consume`` the tensors ``grad.dz`` and ``skip.dz`` may be lost.
        """
        op = self._bprop.consume if consume else self._bprop
        return op(*grad, weight, *_flat(x), *_statistics(norm), *_skip(skip), *conv, dtype)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_conv(self, op: str, x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> None:
        _check.activation(op, "x", x)
        if weight.dim() != 4 or weight.shape[2] != self.kernel or weight.shape[3] != self.kernel:
            _check.fail(
                op, "weight", f"of shape (K, C / groups, {self.kernel}, {self.kernel})", f"shape {tuple(weight.shape)}"
            )
        if weight.dtype != x.dtype:
            _check.fail(op, "weight", f"of x's dtype {x.dtype}", weight.dtype, TypeError)
        _check.device(op, "weight", weight, "x", x)
        for name, value in (("stride", stride), ("dilation", dilation), ("groups", groups)):
            if value < 1:
                _check.fail(op, name, ">= 1", value)
        if self.kernel == 1 and groups != 1:
            _check.fail(op, "groups", "of 1", groups)
        if x.shape[1] != weight.shape[1] * groups:
            _check.fail(
                op,
                "x",
                f"of {weight.shape[1] * groups} channels (weight {tuple(weight.shape)}, groups {groups})",
                x.shape[1],
            )
        if weight.shape[0] % groups != 0:
            _check.fail(op, "weight", f"with output channels divisible by groups {groups}", weight.shape[0])

    def _check_fprop(self, x, scale, shift, weight, stride, dilation, groups, statistics) -> None:
        op = f"{self.stem}_fprop"
        self._check_conv(op, x, weight, stride, dilation, groups)
        _check.together(op, scale=scale, shift=shift)
        _check.channels(op, x, x.shape[1], scale=scale, shift=shift)

    def _check_infer(self, x, weight, bias, residual, stride, dilation, groups, relu) -> None:
        op = f"{self.stem}_infer"
        self._check_conv(op, x, weight, stride, dilation, groups)
        _check.channels(op, x, weight.shape[0], bias=bias)
        if residual is not None:
            shape = self._output_shape(x, weight, stride, dilation)
            if tuple(residual.shape) != shape:
                _check.fail(op, "residual", f"of shape {shape}", f"shape {tuple(residual.shape)}")
            if residual.dtype != x.dtype:
                _check.fail(op, "residual", f"of x's dtype {x.dtype}", residual.dtype, TypeError)
            _check.device(op, "residual", residual, "x", x)

    def _check_backward(self, op, dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups) -> None:
        self._check_conv(op, x, weight, stride, dilation, groups)
        _check.activation(op, "dz", dz)
        shape = self._output_shape(x, weight, stride, dilation)
        if tuple(dz.shape) != shape:
            _check.fail(op, "dz", f"of the output's shape {shape}", f"shape {tuple(dz.shape)}")
        _check.device(op, "dz", dz, "x", x)
        _check.sign(op, "sign", sign, dz)
        if _check.together(op, y=y, b=b, c=c):
            _check.same(op, "y", y, "dz", dz, dtype=False)
            if a is None:
                _check.fail(op, "a", "with b and c", None)
        _check.channels(op, x, weight.shape[0], a=a, b=b, c=c)
        _check.together(op, scale=scale, shift=shift)
        _check.channels(op, x, x.shape[1], scale=scale, shift=shift)

    def _check_dgrad(
        self, dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride, dilation, groups
    ) -> None:
        self._check_input_gradient(f"{self.stem}_dgrad", x, scale, mean, rstd, skip, skip_sign)
        self._check_backward(
            f"{self.stem}_dgrad", dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups
        )

    def _check_input_gradient(self, op, x, scale, mean, rstd, skip, skip_sign) -> None:
        if _check.together(op, mean=mean, rstd=rstd) and scale is None:
            _check.fail(op, "scale and shift", "with mean and rstd", None)
        _check.channels(op, x, x.shape[1], mean=mean, rstd=rstd)
        if skip is not None:
            if scale is not None:
                _check.fail(op, "skip", "None for a deferred x", f"shape {tuple(skip.shape)}")
            _check.same(op, "skip", skip, "x", x, dtype=False)
            _check.sign(op, "skip_sign", skip_sign, skip)

    def _check_wgrad(self, dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups, dtype) -> None:
        self._check_backward(
            f"{self.stem}_wgrad", dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups
        )
        if dtype not in _check.FLOATING:
            _check.fail(f"{self.stem}_wgrad", "dtype", "floating", dtype, TypeError)

    def _check_bprop(
        self,
        dz,
        sign,
        y,
        a,
        b,
        c,
        weight,
        x,
        scale,
        shift,
        mean,
        rstd,
        skip,
        skip_sign,
        stride,
        dilation,
        groups,
        dtype,
    ) -> None:
        op = f"{self.stem}_bprop"
        self._check_input_gradient(op, x, scale, mean, rstd, skip, skip_sign)
        self._check_backward(op, dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups)
        if dtype not in _check.FLOATING:
            _check.fail(op, "dtype", "floating", dtype, TypeError)

    # --- fakes -------------------------------------------------------------------------------------------------------

    def _output_shape(self, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Any, ...]:
        p, q = (output_size(size, self.kernel, stride, dilation) for size in x.shape[2:])
        return (x.shape[0], weight.shape[0], p, q)

    def _fake_fprop(self, x, scale, shift, weight, stride, dilation, groups, statistics):
        y = empty_channels_last(x, *self._output_shape(x, weight, stride, dilation))
        tiles = 1 if statistics else 0
        mean = x.new_empty((tiles, weight.shape[0]), dtype=reference.compute_dtype(x.dtype))
        return y, x.new_empty((tiles,), dtype=torch.int32), mean, torch.empty_like(mean)

    def _fake_infer(self, x, weight, bias, residual, stride, dilation, groups, relu):
        return empty_channels_last(x, *self._output_shape(x, weight, stride, dilation))

    def _fake_dgrad(self, dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, *rest):
        sums = x.new_empty((0 if mean is None else x.shape[1],), dtype=reference.compute_dtype(x.dtype))
        return empty_channels_last(x, *x.shape), sums, torch.empty_like(sums)

    def _fake_wgrad(self, dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups, dtype):
        return torch.empty_like(weight, dtype=dtype)

    def _fake_bprop(self, *args):
        return (*self._fake_dgrad(*args), torch.empty_like(args[6], dtype=args[-1]))


def _flat(x: Tensor | Deferred) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (x.y, x.scale, x.shift) if isinstance(x, Deferred) else (x, None, None)


def _statistics(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.mean, norm.rstd)


def _skip(skip: Gradient | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if skip is None else (skip.dz, skip.sign)
