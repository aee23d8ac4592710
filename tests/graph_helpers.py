"""Small captured networks, and what stands in for a CUDA graph where there is no GPU: a tape of PyTorch's operators."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randn
from networks import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused

EXACT = 1e-10
SHAPE = (2, 3, 16, 12)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Tape(TorchDispatchMode):
    """Operators with their arguments and results.

    A replay writes over the results; it runs no Python of the model, and reads the tensors of the recording.
    """

    def __init__(self, pool):
        super().__init__()
        self.calls, self._pool = [], pool

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def pool(self):
        return self._pool

    def replay(self):
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                        old.copy_(new)


class TapeRecorder:
    """What :class:`graphs.CudaRecorder` is for a GPU."""

    def __init__(self, device):
        self.device = device

    def warm_up(self, run):
        run()

    def record(self, run, pool):
        with Tape(object() if pool is None else pool) as tape:
            out = run()
        return tape, out


def networks(device="cpu", kind="bottleneck"):
    """A fused network and PyTorch's, in eval mode, with the same weights."""
    plain = tiny(kind).eval().to(device)
    return resnet_fused.fuse(copy.deepcopy(plain)), plain


def image(device="cpu", seed=0, shape=SHAPE):
    return randn(*shape, seed=seed, device=device)


def exact(plain, *inputs):
    with torch.no_grad():
        return plain(*inputs)
