"""Count what autograd keeps of a model's forward until its backward."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused.ops import bn_add_relu


def saved_bytes(model: nn.Module, x: Tensor, *, packed: bool = True) -> int:
    """Bytes that one call ``model(x)`` keeps for backward: every storage once, the model's own tensors left out.

    The model runs on fake tensors as it is, fused or not, in its mode and under the caller's autocast (of the CPU).
    What does not grow with the batch (vectors, weights cast by autocast) is counted, too: the difference between two
    batches is without it.

    Args:
        model: any module; a copy of it is run, it stays as it is.
        x: an input, of which shape, dtype, memory format and ``requires_grad`` matter.
        packed: count the sign of a block's sum as the 1 bit an element that a GPU keeps; False as the CPU has it, which
            keeps the output in its place.
    """
    twin = copy.deepcopy(model).cpu()
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[_storage(t)] = t
        return t

    masks = bn_add_relu.packed_masks() if packed else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, masks:
        tensors = [*twin.parameters(), *twin.buffers()]
        tensors += [fake.from_tensor(t) for t in tensors]  # whose storages views of a parameter have
        own = {_storage(t) for t in tensors}
        images = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).requires_grad_(x.requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = twin(images)
        del out
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
