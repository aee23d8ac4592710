"""The contract that ``conv1x1`` and ``conv3x3`` share: five ops each, defined once and registered under both stems.

========  ======================================================================================================
fprop     ``y = conv2d(x or act(x * scale + shift), weight)``, and per-tile statistics of the rounded ``y``
infer     ``act(conv2d(x or act(x * scale + shift), weight) + bias + residual)``
dgrad     gradient of the input, from ``dy = a * dz' + b * y + c``, plus ``skip_scale`` times the masked skip gradient;
          deferred input: the sum of both through its activation, with the two sums of its batch norm and the PReLU's
          ``dslope``
wgrad     gradient of the weight, both operands formed on the way
bprop     dgrad and wgrad together, for a backend that forms ``dy`` once
========  ======================================================================================================

``act`` is the ReLU, or with slopes the PReLU of arXiv 1502.01852.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Conv, Deferred, Gradient, Norm, TileStatistics
from resnet_fused.ops import _check
from resnet_fused.ops._op import Op, empty_channels, empty_channels_last, empty_tiles

_GEOMETRY = "int stride, int dilation, int groups"
_GRADIENT = "Tensor dz, Tensor? sign, Tensor? y, Tensor? a, Tensor? b, Tensor? c"
_INPUT = "Tensor x, Tensor? scale, Tensor? shift, Tensor? slope"
_EPILOGUE = "Tensor? mean, Tensor? rstd, Tensor? skip, Tensor? skip_sign, float skip_scale"


def output_size(size: Any, kernel: int, stride: int, dilation: int) -> Any:
    """Height or width of the output for padding ``dilation * (kernel - 1) // 2``."""
    return reference.output_size(size, kernel, stride, dilation * (kernel - 1) // 2, dilation)


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
            f"{stem}_infer({_INPUT}, Tensor weight, Tensor bias, Tensor? residual, {_GEOMETRY}, bool relu,"
            " Tensor? out_slope) -> Tensor",
            self._check_infer,
            self._fake_infer,
        )
        self._dgrad = Op(
            f"{stem}_dgrad({_GRADIENT}, Tensor weight, {_INPUT}, {_EPILOGUE}, {_GEOMETRY})"
            " -> (Tensor, Tensor, Tensor, Tensor)",
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
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
        self,
        x: Tensor | Deferred,
        weight: Tensor,
        bias: Tensor,
        conv: Conv,
        *,
        residual: Tensor | None = None,
        relu: bool = True,
        slope: Tensor | None = None,
    ) -> Tensor:
        """``act(conv2d(x, weight) + bias + residual)`` with ``act`` the ReLU, or nothing where ``relu`` is False.

        Args:
            x: (N, C, H, W), plain or deferred.
            bias: (K,) fp32 (fp64).
            residual: shape and dtype of the result.
            slope: (K,) as ``bias``; the result's activation is the PReLU then, whatever ``relu`` says.
        """
        return self._infer(*_flat(x), weight, bias, residual, *conv, relu and slope is None, slope)

    def bind(
        self,
        x: Tensor | Deferred,
        weight: Tensor,
        bias: Tensor,
        conv: Conv,
        *,
        residual: Tensor | None,
        relu: bool,
        slope: Tensor | None = None,
        overwrite_residual: bool = False,
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """:meth:`infer` as a function of ``x`` and ``residual``, the choices and preparations made once.

        It serves inputs of the same shape, dtype, device and memory format as these; of a deferred ``x`` it takes the
        tensor ``y`` and keeps the rest. With ``overwrite_residual`` the result may be written over ``residual``.
        """
        first, *pending = _flat(x)
        rest = (*conv, relu and slope is None, slope)
        bound = self._infer.bind(first, *pending, weight, bias, residual, *rest, overwrite_residual=overwrite_residual)
        return bound if bound is not None else lambda x, r: self._infer(x, *pending, weight, bias, r, *rest)

    def dgrad(
        self,
        grad: Gradient,
        weight: Tensor,
        x: Tensor | Deferred,
        norm: Norm | None,
        conv: Conv,
        *,
        skip: Gradient | None = None,
        skip_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dbeta, dgamma, dslope)``; for a deferred ``x``, ``dx`` is the gradient of ``y * scale + shift``.

        ``skip_scale`` times the masked ``skip.dz`` is added to the gradient of what the convolution reads: to ``dx`` of
        a plain ``x``, before the activation of a deferred one. Without ``norm`` the sums are empty; ``dslope`` (C,),
        the sum of ``dact * z`` over the values that are not above 0, is empty without slopes.
        """
        return self._dgrad(*grad, weight, *_flat(x), *_statistics(norm), *_skip(skip), skip_scale, *conv)

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
        skip_scale: float = 1.0,
        consume: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dbeta, dgamma, dslope, dw)``, see :meth:`dgrad` and :meth:`wgrad`.

        With ``consume`` the tensors ``grad.dz`` and ``skip.dz`` may be lost.
        """
        op = self._bprop.consume if consume else self._bprop
        return op(*grad, weight, *_flat(x), *_statistics(norm), *_skip(skip), skip_scale, *conv, dtype)

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

    def _check_input(self, op: str, x: Tensor, scale, shift, slope) -> None:
        if not _check.together(op, scale=scale, shift=shift) and slope is not None:
            _check.fail(op, "scale and shift", "with slope", None)
        _check.channels(op, x, x.shape[1], scale=scale, shift=shift, slope=slope)

    def _check_fprop(self, x, scale, shift, slope, weight, stride, dilation, groups, statistics) -> None:
        op = f"{self.stem}_fprop"
        self._check_conv(op, x, weight, stride, dilation, groups)
        self._check_input(op, x, scale, shift, slope)

    def _check_infer(
        self, x, scale, shift, slope, weight, bias, residual, stride, dilation, groups, relu, out_slope
    ) -> None:
        op = f"{self.stem}_infer"
        self._check_conv(op, x, weight, stride, dilation, groups)
        self._check_input(op, x, scale, shift, slope)
        _check.channels(op, x, weight.shape[0], bias=bias, out_slope=out_slope)
        if relu and out_slope is not None:
            _check.fail(op, "relu", "False with out_slope", relu)
        if residual is not None:
            shape = self._output_shape(x, weight, stride, dilation)
            if tuple(residual.shape) != shape:
                _check.fail(op, "residual", f"of shape {shape}", f"shape {tuple(residual.shape)}")
            if residual.dtype != x.dtype:
                _check.fail(op, "residual", f"of x's dtype {x.dtype}", residual.dtype, TypeError)
            _check.device(op, "residual", residual, "x", x)

    def _check_backward(self, op, grad, weight, deferred, geometry) -> None:
        dz, sign, y, a, b, c = grad
        x = deferred[0]
        self._check_conv(op, x, weight, *geometry)
        _check.activation(op, "dz", dz)
        shape = self._output_shape(x, weight, *geometry[:2])
        if tuple(dz.shape) != shape:
            _check.fail(op, "dz", f"of the output's shape {shape}", f"shape {tuple(dz.shape)}")
        _check.device(op, "dz", dz, "x", x)
        _check.sign(op, "sign", sign, dz)
        if _check.together(op, y=y, b=b, c=c):
            _check.same(op, "y", y, "dz", dz, dtype=False)
            if a is None:
                _check.fail(op, "a", "with b and c", None)
        _check.channels(op, x, weight.shape[0], a=a, b=b, c=c)
        self._check_input(op, *deferred)

    def _check_input_gradient(self, op, x, scale, mean, rstd, skip, skip_sign) -> None:
        if _check.together(op, mean=mean, rstd=rstd) and scale is None:
            _check.fail(op, "scale and shift", "with mean and rstd", None)
        _check.channels(op, x, x.shape[1], mean=mean, rstd=rstd)
        if skip is not None:
            _check.same(op, "skip", skip, "x", x, dtype=False)
            _check.sign(op, "skip_sign", skip_sign, skip)

    def _check_dgrad(self, *args) -> None:
        self._check_both(f"{self.stem}_dgrad", *args)

    def _check_bprop(self, *args) -> None:
        *rest, dtype = args
        self._check_both(f"{self.stem}_bprop", *rest)
        _check.floating(f"{self.stem}_bprop", "dtype", dtype)

    def _check_both(
        self, op, dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale,
        *geometry,
    ) -> None:  # fmt: skip
        self._check_input_gradient(op, x, scale, mean, rstd, skip, skip_sign)
        self._check_backward(op, (dz, sign, y, a, b, c), weight, (x, scale, shift, slope), geometry)

    def _check_wgrad(self, dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> None:
        *geometry, dtype = rest
        op = f"{self.stem}_wgrad"
        self._check_backward(op, (dz, sign, y, a, b, c), weight, (x, scale, shift, slope), geometry)
        _check.floating(op, "dtype", dtype)

    # --- fakes -------------------------------------------------------------------------------------------------------

    def _output_shape(self, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Any, ...]:
        p, q = (output_size(size, self.kernel, stride, dilation) for size in x.shape[2:])
        return (x.shape[0], weight.shape[0], p, q)

    def _fake_fprop(self, x, scale, shift, slope, weight, stride, dilation, groups, statistics):
        y = empty_channels_last(x, *self._output_shape(x, weight, stride, dilation))
        return (y, *empty_tiles(y, statistics))

    def _fake_infer(self, x, scale, shift, slope, weight, bias, residual, stride, dilation, groups, relu, out_slope):
        return empty_channels_last(x, *self._output_shape(x, weight, stride, dilation))

    def _fake_dgrad(self, dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, *rest):
        dx = empty_channels_last(x, *x.shape)
        return (dx, *(empty_channels(x, given is not None) for given in (mean, rstd, slope)))

    def _fake_wgrad(self, dz, sign, y, a, b, c, weight, *rest):
        return torch.empty_like(weight, dtype=rest[-1])

    def _fake_bprop(self, *args):
        return (*self._fake_dgrad(*args), torch.empty_like(args[6], dtype=args[-1]))


def _flat(x: Tensor | Deferred) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return tuple(x) if isinstance(x, Deferred) else (x, None, None, None)  # type: ignore[return-value]


def _statistics(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.mean, norm.rstd)


def _skip(skip: Gradient | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if skip is None else (skip.dz, skip.sign)
