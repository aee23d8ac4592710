"""A fused Bottleneck against torchvision's, eager, same weights: inference, and a training step's forward and backward.

Verified before timing: the output, and in training the input's gradient, agree with torchvision's in fp64. Both sides
run channels_last with cuDNN's own search on. The time is the host's until the device is done, on a GPU with a cold L2.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision.models import resnet

import resnet_fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 256 if CUDA else 4
TOLERANCE = 3e-2 if CUDA else 1e-3  # of the norm: a ReLU that flips where its input is near 0 moves single values more
L2_BYTES = 256 * 2**20  # beyond the L2 cache of any GPU so far

SHAPES = [
    pytest.param(256, 64, 56, id="stage1"),  # the largest tensors of ResNet-50: bound by memory
    pytest.param(1024, 256, 14, id="stage3"),  # six of its sixteen blocks
]


def make(width: int, planes: int, size: int):
    """The eager block, its fused twin, and an input."""
    torch.manual_seed(0)
    eager = resnet.Bottleneck(width, planes)
    for norm in (eager.bn1, eager.bn2, eager.bn3):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    fused = resnet_fused.Bottleneck(width, planes)
    fused.load_state_dict(eager.state_dict())
    eager, fused = (block.to(DEVICE, DTYPE, memory_format=torch.channels_last) for block in (eager, fused))
    x = torch.randn(BATCH, width, size, size, device=DEVICE, dtype=DTYPE)
    return eager, fused, x.to(memory_format=torch.channels_last)


def step(block, x):
    """Forward, and in training backward; what a caller gets out of it."""
    if not block.training:
        with torch.no_grad():
            return [block(x)]
    x = x.detach().requires_grad_()
    block.zero_grad(set_to_none=True)
    y = block(x)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad]


def verify(eager, fused, x) -> None:
    few = x[:2]  # enough to be wrong, and fp64 of all of them takes minutes
    wanted = step(copy.deepcopy(eager).double(), few.double())
    for name, got, want in zip(("output", "gradient"), step(copy.deepcopy(fused), few), wanted, strict=False):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error <= TOLERANCE, f"{name}: off by {error:.2e} of its norm; a wrong result has no time"


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("width", "planes", "size"), SHAPES)
@pytest.mark.parametrize("side", ["eager", "fused"])
def bench_bottleneck(benchmark, width, planes, size, mode, side):
    torch.backends.cudnn.benchmark = True
    eager, fused, x = make(width, planes, size)
    for block in (eager, fused):
        block.train(mode == "train")
    verify(eager, fused, x)
    block = fused if side == "fused" else eager
    cold = torch.empty(L2_BYTES if CUDA else 0, dtype=torch.uint8, device=DEVICE)

    def setup():
        cold.zero_()
        if CUDA:
            torch.cuda.synchronize()

    def timed():
        step(block, x)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"bottleneck {width}x{size}x{size} {mode}"
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "dtype": str(DTYPE),
        "layout": "channels_last",
        "l2": "cold" if CUDA else "warm",
        "torch": torch.__version__,
    }
    benchmark.pedantic(timed, setup=setup, rounds=30 if CUDA else 7, warmup_rounds=5 if CUDA else 1)
