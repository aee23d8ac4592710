"""Synchronised batch norm: two processes with a share each compute one batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from block_helpers import BASIC, EXACT, IDENTITY, norms_of
from cases import BlockCase
from helpers import assert_close, block_input, build, randn, randomise, step
from torch import Tensor, nn
from torchvision.models import resnet

import resnet_fused
from resnet_fused.blocks.paths import recording

SPLITS = {"even": [3, 3], "uneven": [4, 2], "single": [5, 1], "empty": [6, 0]}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def batch_block(case: BlockCase) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build(case, resnet_fused)).double()


def synchronise(block: nn.Module) -> nn.Module:
    """In place, after DistributedDataParallel, which refuses to wrap SyncBatchNorm on the CPU."""
    for norm in norms_of(block):
        norm.__class__, norm.process_group = nn.SyncBatchNorm, None
    return block


def sync_worker(rank: int, port: int, folder: str) -> None:
    """Steps on this rank's share of the batch; what came out goes to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in (IDENTITY, BASIC):
        x = block_input(case, 6)
        for name, split in SPLITS.items():
            block = synchronise(batch_block(case))
            with recording() as calls:
                result = step(block, x.split(split)[rank], split_dout(block, case, split, rank))
            assert [call.path for call in calls] == ["train"]
            found[case.kind, name] = result, dict(block.named_buffers())
        parallel = nn.parallel.DistributedDataParallel(batch_block(case))
        synchronise(parallel.module)
        out = parallel(x.split([3, 3])[rank])
        out.backward(2 * split_dout(parallel.module, case, [3, 3], rank))  # DDP takes the mean over ranks
        gradients = {name: p.grad for name, p in parallel.module.named_parameters()}
        found[case.kind, "ddp"] = {"out": out.detach()} | gradients, dict(parallel.module.named_buffers())
    tiny = BlockCase("basic", 3, 3, 1, "identity", {}, (1, 1), "one pixel")
    found["one value on each rank"] = step(synchronise(batch_block(tiny)), block_input(tiny, 2).split([1, 1])[rank])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def split_dout(block: nn.Module, case: BlockCase, split: list[int], rank: int) -> Tensor:
    channels = case.planes * block.expansion
    size = [-(-s // case.stride) for s in case.size]
    return randn(sum(split), channels, *size, seed=9).split(split)[rank]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.spawn(sync_worker, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("split", [*SPLITS, "ddp"])
@pytest.mark.parametrize("case", [IDENTITY, BASIC], ids=lambda case: case.id)
def test_sync_batch_norm_is_one_batch(ranks, case, split):
    """Two ranks with a share each give what torchvision's block gives for the whole batch in one process."""
    torch.manual_seed(0)
    whole = randomise(build(case, resnet)).double()
    exact = step(whole, block_input(case, 6))
    results = [found[case.kind, split] for found in ranks]
    for name, expected in exact.items():
        parts = [result[name] for result, _ in results if name in result]
        if not parts:
            assert (split, name) == ("ddp", "x")
        elif name in ("out", "x"):
            assert_close(torch.cat(parts), expected, EXACT, name)
        elif split == "ddp":
            assert torch.equal(*parts)
            assert_close(parts[0], expected, 1e-9, name)
        else:
            assert_close(sum(parts), expected, 1e-9, name)
    for _, buffers in results:
        for name, expected in whole.named_buffers():
            assert_close(buffers[name], expected, EXACT, name)


def test_sync_batch_norm_takes_one_value_from_each_rank(ranks):
    """PyTorch refuses one value per channel of the whole batch alone."""
    case = BlockCase("basic", 3, 3, 1, "identity", {}, (1, 1), "one pixel")
    torch.manual_seed(0)
    exact = step(
        randomise(build(case, resnet)).double(), block_input(case, 2), randn(1, 3, 1, 1, seed=9).repeat(2, 1, 1, 1)
    )
    assert_close(torch.cat([found["one value on each rank"]["out"] for found in ranks]), exact["out"], EXACT)
