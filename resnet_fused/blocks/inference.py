"""Inference: norms folded into the convolutions, kernels chosen and weights laid out once per kind of input.

What is kept lives outside the modules (weakly keyed), so a module stays picklable, copyable and of its own size. It is
made anew when a tensor that it was made from was replaced or written to in place, and at every ``eval()``, ``train()``
and ``refresh``; writes that PyTorch does not count (through ``.data``, numpy or a collective) are seen only then.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnet_fused import backends, ops, plans
from resnet_fused.autograd.layer import no_autocast
from resnet_fused.blocks import norms, paths, pinned
from resnet_fused.blocks.layout import channels_last, eager_format, like_eager, operand_dtype
from resnet_fused.blocks.structure import Structure, chain_shape, geometry, mixture, promoted
from resnet_fused.operands import Deferred, Mix, Norm
from resnet_fused.reference import compute_dtype

Step = Callable[[Tensor, Tensor | None], Tensor]
"""A convolution with folded norm, bound to its kernel: (x, residual) -> out."""


class Folded(NamedTuple):
    """``bn(conv2d(x, w))`` as ``conv2d(x, weight) + bias``."""

    weight: Tensor  # (K, C / groups, R, R), channels_last, the convolution's dtype
    bias: Tensor  # (K,) fp32 (fp64)


def fold(conv: nn.Conv2d, norm: Any, dtype: torch.dtype) -> Folded:
    """Fold ``norm``'s running statistics (and the bias) into ``conv``'s weight, in fp32 (fp64), rounded once."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used outside inference mode
            return fold(conv, norm, dtype)
    wide = compute_dtype(dtype)
    if norm is None:
        bias = conv.weight.new_zeros(conv.out_channels, dtype=wide) if conv.bias is None else conv.bias.to(wide)
        return Folded(channels_last(conv.weight.to(dtype)), bias)
    resolved = frozen_norm(norm, wide)
    weight = conv.weight.to(wide) * resolved.scale.view(-1, 1, 1, 1)
    shift = resolved.shift if conv.bias is None else torch.addcmul(resolved.shift, conv.bias.to(wide), resolved.scale)
    return Folded(channels_last(weight.to(dtype)), shift)


def frozen_norm(norm: Any, wide: torch.dtype) -> Norm:
    """``norm``'s running statistics as scale and shift in ``wide``."""
    gamma, beta, mean, var = norms.parameters(norm)
    assert mean is not None  # only frozen norms are folded
    assert var is not None
    return ops.batch_norm.frozen(gamma, beta, mean, var, norm.eps, wide)


class Program:
    """A block's inference for inputs like ``x``: every convolution is bound to its kernel by the first call."""

    def __init__(self, structure: Structure, x: Tensor, backend: str) -> None:
        self._structure, self._dtype, self._backend = structure, operand_dtype(x), backend
        self._plain = eager_format(x, structure.chain) != torch.channels_last
        self._steps: dict[str, Step] = {}
        unit, wide = structure.unit, compute_dtype(self._dtype)
        self._pre = None if unit.pre is None else frozen_norm(unit.pre, wide)
        self._post = None if unit.post is None else frozen_norm(unit.post, wide)
        self._folded: list[Tensor] = [v for norm in (self._pre, self._post) if norm is not None for v in norm]
        self._plans: plans.Own | None = None  # when all is folded

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run(x)
        if self._backend == "auto":
            return self._call(x)
        with backends.use_backend(self._backend):
            return self._call(x)

    def _call(self, x: Tensor) -> Tensor:
        if self._plans is not None:
            with no_autocast(x):
                (out,) = self._plans.call(Program._alone, self, [x])
            assert out is not None
            return out
        out = self._run(x)
        # Modules of PyTorch's and rules of mixing may do anything at each call.
        if self._structure.before is None and self._structure.unit.mixing is None:
            self._plans = plans.Own(self._folded)
        return out

    def _alone(self, x: Tensor) -> tuple[Tensor]:
        return (self._run(x),)

    def _run(self, x: Tensor) -> Tensor:
        structure, unit = self._structure, self._structure.unit
        with no_autocast(x):
            source = self._source(x)
            read, shown = source, x
            if structure.before is not None and isinstance(source, Deferred):
                # Modules of PyTorch's read the pre-activated tensor too, so it is written.
                read, *_ = ops.bn_add_relu.forward(source, None, sign=False)
                shown = like_eager(read, x, ())
        outside = None if structure.before is None else structure.before(shown)
        mix, gate, total = mixture(structure, x, outside, self._dtype)
        with no_autocast(x):
            residual, scratch = self._residual(x, read, outside)
            h: Tensor | Deferred = read
            for i, (conv, norm) in enumerate(structure.chain[:-1]):
                h = self._conv(f"{i}", conv, norm, h, None, relu=unit.prelu is None, slope=unit.prelu)
            conv, norm = structure.chain[-1]
            if mix == Mix() and not unit.branch_relu:
                # The sum, and the ReLU if nothing stands between, come with the last convolution.
                relu, slope = (False, None) if self._post is not None else (unit.relu, unit.end_prelu)
                relu = relu and slope is None
                out = self._conv("end", conv, norm, h, residual, relu=relu, slope=slope, overwrite_residual=scratch)
            else:
                out = self._conv("last", conv, norm, h, None, relu=unit.branch_relu)
        if total is not None and gate is None and unit.mixing is not None:
            gate = unit.mixing.gate(ops.bn_add_relu.pool(out), total)
        with no_autocast(x):
            if mix != Mix() or unit.branch_relu:
                slopes = _slopes(unit.end_prelu, out.shape[1], self._dtype)
                relu = unit.relu and self._post is None
                out, *_ = ops.bn_add_relu.forward(
                    out, residual, sign=False, mix=mix, gate=gate, relu=relu and slopes is None, slope=slopes
                )
            if self._post is not None:
                normed = Deferred(out, self._post.scale, self._post.shift)
                out, *_ = ops.bn_add_relu.forward(normed, None, sign=False, relu=unit.relu)
        out = promoted(structure, out, outside)
        return out.contiguous() if self._plain else out

    def _source(self, x: Tensor) -> Tensor | Deferred:
        """What the chain reads."""
        h = self._operand(x)
        if self._pre is not None:
            return Deferred(h, self._pre.scale, self._pre.shift)
        if self._structure.unit.pre_relu:
            one = h.new_ones(h.shape[1], dtype=compute_dtype(h.dtype))
            return Deferred(h, one, torch.zeros_like(one))
        return h

    def _residual(self, x: Tensor, read: Tensor | Deferred, outside: Tensor | None) -> tuple[Tensor | None, bool]:
        """What is added to the branch, and whether it may be written over."""
        structure = self._structure
        if not structure.unit.has_shortcut:
            return None, False
        if structure.projection is not None:
            source = read if outside is None else self._operand(outside)
            return self._conv("projection", *structure.projection, source, None, relu=False), True
        if outside is None:
            return self._operand(x), False
        return self._operand(outside.expand(chain_shape(structure, tuple(x.shape)))), False  # a sum broadcasts

    def _operand(self, t: Tensor) -> Tensor:
        return channels_last(t.to(self._dtype))

    def _conv(
        self,
        name: str,
        conv: nn.Conv2d,
        norm: Any,
        h: Tensor | Deferred,
        residual: Tensor | None,
        *,
        relu: bool,
        slope: nn.PReLU | None = None,
        overwrite_residual: bool = False,
    ) -> Tensor:
        """One convolution with its norm folded, bound at the first call."""
        x = h if isinstance(h, Tensor) else h.y
        step = self._steps.get(name)
        if step is None:
            weight, bias = fold(conv, norm, self._dtype)
            slopes = _slopes(slope, conv.out_channels, self._dtype)
            self._folded += [t for t in (weight, bias, slopes) if t is not None]
            step = self._steps[name] = ops.conv(conv.kernel_size[0]).bind(
                h,
                weight,
                bias,
                geometry(conv),
                residual=residual,
                relu=relu,
                slope=slopes,
                overwrite_residual=overwrite_residual,
            )
        return step(x, residual)


def _slopes(prelu: nn.PReLU | None, channels: int, dtype: torch.dtype) -> Tensor | None:
    """A PReLU's slopes as the vector that ops take."""
    if prelu is None:
        return None
    return prelu.weight.detach().to(compute_dtype(dtype)).expand(channels).contiguous()


# --- what is kept ---------------------------------------------------------------------------------------------------

_KINDS = 4  # kinds of input kept per module


class _Kept(NamedTuple):
    tensors: list[Tensor]  # these and their storages are held, so that neither identity nor address
    storages: list[torch.UntypedStorage]  # can be taken over by another one
    marks: list[Any]
    made: dict[Hashable, Any]  # by kind of input


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    found: list[Tensor | None] = []
    for module in modules:
        found += module._parameters.values()
        found += module._buffers.values()
    return [t for t in found if t is not None]


def _marks(modules: Sequence[nn.Module], tensors: list[Tensor]) -> list[Any]:
    """Equal for equal modules with the same tensors that have not been written to."""
    marks = paths.signature(modules)
    marks += [module.__dict__.get("eps") for module in modules]
    marks += map(id, tensors)
    marks += map(Tensor.data_ptr, tensors)
    marks += map(_version, tensors)  # raises for inference tensors
    return marks


_version = operator.attrgetter("_version")


def kind_of(owner: Any, x: Tensor, dtype: torch.dtype) -> Hashable:
    """What, besides the modules, inference depends on; None where nothing may be kept.

    Work on a CUDA stream is ordered for that stream alone; a graph that is being captured outlives what is kept, unless
    it has pins.
    """
    stream = None
    if x.is_cuda and pinned.current() is None:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream
    backend = owner._resnet_fused_backend
    if backend == "auto":
        backend = backends.forced()
    return (type(x), x.shape, x.stride(), x.dtype, dtype, x.device, stream, backend)


def recall(owner: nn.Module, modules: Sequence[nn.Module], kind: Hashable) -> Callable[[Tensor], Tensor] | None:
    """What :func:`keep` kept for ``owner`` and this kind of input, if ``modules`` and their tensors are unchanged."""
    if torch.compiler.is_compiling() or kind is None:
        return None
    pins = pinned.current()
    if pins is not None:
        return pins.made.get((owner, kind))
    kept = _kept.get(owner)
    if kept is None or kind not in kept.made:
        return None
    try:
        return kept.made[kind] if kept.marks == _marks(modules, _tensors(modules)) else None
    except RuntimeError:  # a tensor was replaced by an inference tensor, which has no version
        return None


def keep(
    owner: nn.Module,
    modules: Sequence[nn.Module],
    sources: Sequence[Tensor | None],
    kind: Hashable,
    made: Callable[[Tensor], Tensor],
) -> None:
    """Keep what was made for ``owner`` from ``sources``, tensors of ``modules``, for this kind of input."""
    if torch.compiler.is_compiling() or kind is None:
        return
    pins = pinned.current()
    if pins is not None:
        pins.hold(owner, sources, kind, made)
        return
    tensors = _tensors(modules)
    known = set(map(id, tensors))
    if any(t is not None and (id(t) not in known or _is_shared(t)) for t in sources):
        return  # a plain attribute, or memory that another process may write to: changes could go unseen
    # Inference tensors have no version, so a kept result could go stale unseen; fake ones belong to their mode.
    if torch._C._len_torch_dispatch_stack() or any(t.is_inference() or isinstance(t, FakeTensor) for t in tensors):
        return
    kept, marks = _kept.get(owner), _marks(modules, tensors)
    if kept is None or kept.marks != marks:
        kept = _kept[owner] = _Kept(tensors, [t.untyped_storage() for t in tensors], marks, {})
    for oldest in list(kept.made)[: len(kept.made) - _KINDS + 1]:
        kept.made.pop(oldest, None)
    kept.made[kind] = made


def _is_shared(t: Tensor) -> bool:
    """Whether another process may write to ``t``; PyTorch says so of all CUDA memory."""
    return t.is_cpu and t.is_shared()


def forget(owner: nn.Module) -> None:
    """Drop what is kept for ``owner``."""
    _kept.pop(owner, None)
    pinned.forget(owner)


def _forget_written(optimizer: Any, args: Any, kwargs: Any) -> None:
    """After a step of an optimizer with ``fused=True``: it writes parameters without giving them a new version."""
    written = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    if written:
        _kept.clear()
        pinned.written(written)


register_optimizer_step_post_hook(_forget_written)
