"""Counting, building and comparing whole networks."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused.blocks.paths import recording


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmac(model: nn.Module, size: int) -> float:
    """Multiply-adds of one image in units of 1e9, counted by PyTorch on the original forward."""
    image = torch.empty(1, 3, size, size, device="meta")
    with resnet_fused.disabled(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() / 2e9


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def seeded(build, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return build(*args, **kwargs)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Same keys in the same order, and the same bits."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def relative_error(values: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Root-mean-square error over all elements, relative to the reference's own root mean square."""
    difference = sum(((a.double() - b) ** 2).sum() for a, b in zip(values, reference, strict=True))
    return (difference / sum((b.double() ** 2).sum() for b in reference)).sqrt().item()


def run(model: nn.Module, x: torch.Tensor, train: bool) -> dict[str, list[torch.Tensor]]:
    """What a caller can see of one call: the output, in training also the buffers and gradients."""
    model.train(train)
    if not train:
        with torch.no_grad():
            return {"output": [model(x)]}
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {
        "output": [output.detach()],
        "buffers": list(model.buffers()),
        "gradients": [x.grad] + [parameter.grad for parameter in model.parameters()],
    }


def assert_computes_the_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, train: bool, fused: int) -> None:
    """``ours`` against the stock ``theirs`` with the same weights, in fp64 and in fp32; ``fused`` modules take part.

    fp32 is measured against fp64, and may have twice the error of ``theirs`` plus 4 eps. ``theirs`` runs in
    channels_last, as we do inside: oneDNN's fp32 3x3 convolution has 2 to 5 times the error there that it has in NCHW.
    Gradients of a whole network are no measure of rounding: one activation that changes sides of its ReLU moves them by
    a per cent, in ``theirs`` as in ours. They are compared tightly in fp64 and against a gross error in fp32.
    """
    exact, ours64 = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    with recording() as calls:
        got, got64 = run(ours, x, train), run(ours64, x.double(), train)
    assert [call.path for call in calls] == ["train" if train else "infer"] * (2 * fused)  # none took the original path
    channels_last = torch.channels_last
    eager = run(theirs.to(memory_format=channels_last), x.contiguous(memory_format=channels_last), train)
    for what, expected in run(exact, x.double(), train).items():
        assert relative_error(got64[what], expected) < 1e-11, what
        allowed = 2 * relative_error(eager[what], expected) + 4 * torch.finfo(torch.float32).eps
        assert relative_error(got[what], expected) <= (0.1 if what == "gradients" else allowed), what
