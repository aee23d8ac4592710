"""Measures of error, and builders of tensors and of pairs of blocks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
from cases import BlockCase
from torch import Tensor, nn
from torchvision.models import resnet

import resnet_fused

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def dtype_id(value: object) -> str | None:
    """A readable id for a dtype; None leaves the id to pytest."""
    return SHORT.get(value) if isinstance(value, torch.dtype) else None


def shell_environment() -> dict[str, str]:
    """The environment without what tells a process that it is a worker of xdist: pytest run by a test is none."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


# --- error ----------------------------------------------------------------------------------------------------------


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact value; 0 for empty tensors."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return ((actual - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def assert_close(actual: Tensor, exact: Tensor, tolerance: float, what: str = "tensor") -> None:
    """:func:`error` within ``tolerance`` (a NaN is not)."""
    found = error(actual, exact)
    assert found <= tolerance, f"{what}: error {found:.3g} above {tolerance:.3g}"


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, floor: float, what: str = "tensor") -> None:
    """Our error at most twice PyTorch's plus a floor; the same dtype."""
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} instead of {theirs.dtype}"
    a, b = error(ours, exact), error(theirs, exact)
    assert a <= 2 * b + floor, f"{what}: error {a:.3g}, PyTorch's {b:.3g}, floor {floor:.3g}"


# --- tensors --------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Normal values that depend on shape and seed alone, whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Values in (0.5, 1.5): variances, positive scales."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(device=device, dtype=dtype)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_zeros(t.shape[0], t.shape[1] + 1, t.shape[2] + 2, 2 * t.shape[3])
    view = wide[:, 1:, 1:-1, ::2]
    return view.copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": _transposed,
    "expanded": _expanded,  # the values change: every image becomes the first
}


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


# --- blocks ---------------------------------------------------------------------------------------------------------


def shortcut(
    name: str, inplanes: int, outplanes: int, stride: int, norm_layer: Callable[..., nn.Module]
) -> nn.Module | None:
    """The ``downsample`` of a :class:`cases.BlockCase`."""
    if name == "identity":
        return None
    if name == "module":
        return nn.Conv2d(inplanes, outplanes, 2, stride)
    projection = (
        nn.Conv2d(inplanes, outplanes, 1, 1 if name == "pooled" else stride, bias=False),
        norm_layer(outplanes),
    )
    return nn.Sequential(nn.AvgPool2d(2, stride), *projection) if name == "pooled" else nn.Sequential(*projection)


def build(case: BlockCase, package: object, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """``case`` from the classes of ``package``: this one's or ``torchvision.models.resnet``."""
    cls = {"basic": package.BasicBlock, "bottleneck": package.Bottleneck}[case.kind]
    options = dict(case.options)
    v1 = options.pop("v1", False)
    down = shortcut(case.shortcut, case.inplanes, case.planes * cls.expansion, case.stride, norm_layer)
    block = cls(case.inplanes, case.planes, case.stride, down, norm_layer=norm_layer, **options)
    if v1:
        block.conv1.stride, block.conv2.stride = (case.stride,) * 2, (1, 1)
    return block


def randomise(block: nn.Module, seed: int = 1) -> nn.Module:
    """Norm parameters and running statistics away from their initial values; some gammas are negative, one is 0."""
    for i, module in enumerate(m for m in block.modules() if hasattr(m, "running_mean")):
        size = module.num_features if hasattr(module, "num_features") else module.weight.numel()
        with torch.no_grad():
            if module.weight is not None:
                module.weight.copy_(randn(size, seed=seed + 10 * i))
                module.weight[0] = 0
                module.bias.copy_(randn(size, seed=seed + 10 * i + 1) * 0.5)
            if module.running_mean is not None:
                module.running_mean.copy_(randn(size, seed=seed + 10 * i + 2) * 0.3)
                module.running_var.copy_(rand(size, seed=seed + 10 * i + 3))
    return block


def pair(
    case: BlockCase, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d, dtype=torch.float64
) -> tuple[nn.Module, nn.Module]:
    """The fused block and torchvision's, with the same randomised state."""
    torch.manual_seed(0)
    plain = randomise(build(case, resnet, norm_layer)).to(dtype)
    fused = build(case, resnet_fused, norm_layer).to(dtype)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    return fused, plain


def block_input(case: BlockCase, n: int = 3, seed: int = 5, dtype=torch.float64) -> Tensor:
    return randn(n, case.inplanes, *case.size, seed=seed, dtype=dtype)


def step(block: nn.Module, x: Tensor, dout: Tensor | None = None, *, need_dx: bool = True) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward; ``dout`` defaults to fixed normal values."""
    block.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(need_dx)
    out = block(x)
    if dout is None:
        dout = randn(*out.shape, seed=9)
    out.backward(dout.to(out.dtype))
    found = {"out": out.detach()} | ({"x": x.grad} if need_dx else {})
    return found | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def assert_same_step(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """The same gradients exist, with the same dtypes, and agree."""
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        assert ours[name].dtype == exact.dtype, name
        assert_close(ours[name], exact, tolerance, name)


def assert_same_buffers(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """Running statistics agree and counters are equal."""
    exact = dict(theirs.named_buffers())
    found = dict(ours.named_buffers())
    assert found.keys() == exact.keys()
    for name, buffer in exact.items():
        if buffer.dtype == torch.int64:
            assert torch.equal(found[name], buffer), f"{name}: {found[name]} instead of {buffer}"
        else:
            assert_close(found[name], buffer, tolerance, name)
