"""Training as the papers do it, on one process or several, resumable at any step with the same bits.

SGD with momentum; the rate falls to a tenth at a half and at three quarters of the steps, and may start with a warm-up
at a tenth (arXiv 1512.03385, section 4.2; arXiv 1603.05027, appendix). Batches and crops are drawn for all processes
from one seed, and every process takes its share, so their number changes nothing but the order of sums and the
statistics of batch norms.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import checkpoints
import torch
from images import Crops, Dataset, Images
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from resnet_fused.cli.output import UsageError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEST_BATCH = 500


class Recipe(NamedTuple):
    """How to train; the defaults are the papers'."""

    epochs: int
    batch: int = 128  # of all processes together
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: int = 0  # steps at a tenth of the rate
    augment: bool = False  # crops of the padded image, mirrored or not
    amp: str = "off"


class World(NamedTuple):
    """This process among those of one run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The process group there is, or that torchrun describes: nccl on GPUs, gloo on the CPU; alone without either."""
    own = not distributed.is_initialized() and "WORLD_SIZE" in os.environ
    if own:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if distributed.is_initialized():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            yield World(distributed.get_rank(), distributed.get_world_size(), local)
        else:
            yield World()
    finally:
        if own:
            distributed.destroy_process_group()


def paper_warmup(depth: int, steps: int) -> int:
    """Steps of warm-up: 400 of the papers' 64,000 from 110 layers on, the same share of a shorter run, else none."""
    return min(400, math.ceil(steps / 160)) if depth >= 110 else 0


class Trainer:
    """A network, its optimiser and where they are in the data.

    Args:
        network: from images (N, 3, H, W) to logits; moved to ``device`` in channels_last.
        seed: of the order of the images and of the crops.

    Raises:
        UsageError: the batch is larger than the data or cannot be shared among the processes.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Dataset,
        recipe: Recipe,
        *,
        device: torch.device,
        seed: int,
        world: World = World(),  # noqa: B008
    ) -> None:
        count = len(data.train.labels)
        if not 0 < recipe.batch <= count:
            raise UsageError(f"argument --batch: expected 1 to the {count} training images, got {recipe.batch}")
        if recipe.batch % world.size:
            raise UsageError(f"argument --batch: expected a multiple of the {world.size} processes, got {recipe.batch}")
        self.data, self.recipe, self.device, self.world = data.to(device), recipe, device, world
        self.network = network.to(device=device, memory_format=torch.channels_last)
        self.model = nn.parallel.DistributedDataParallel(self.network) if world.size > 1 else self.network
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.order = torch.Generator().manual_seed(seed)
        self.crops = torch.Generator().manual_seed(seed + 1)
        self.steps = 0
        self.rows: list[dict[str, Any]] = []  # one for every epoch that is over
        self._begin_epoch()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train.labels) // self.recipe.batch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch is not finite."""
        return bool(self.rows) and not math.isfinite(self.rows[-1]["train_loss"])

    def _factor(self, step: int) -> float:
        """The rate of ``step`` as a share of ``recipe.rate``."""
        if step < self.recipe.warmup:
            return 0.1
        return 1.0 if 2 * step < self.total_steps else 0.1 if 4 * step < 3 * self.total_steps else 0.01

    # --- steps ------------------------------------------------------------------------------------------------------

    def run(self, until: int | None = None, after_step: Callable[[], None] = lambda: None) -> None:
        """Steps up to number ``until``, by default to the end, or to the end of an epoch whose loss is not finite."""
        until = self.total_steps if until is None else min(until, self.total_steps)
        while self.steps < until and not self.diverged:
            self.step()
            after_step()

    def step(self) -> None:
        """One update of the parameters; with the last of an epoch its row."""
        batch, (rank, size, _) = self.recipe.batch, self.world
        begin = self.steps % self.steps_per_epoch * batch
        chosen = self.permutation[begin : begin + batch]
        crops = Crops.draw(batch, self.crops).share(rank, size) if self.recipe.augment else None
        x, labels = self.data.train.batch(chosen[rank::size], crops)
        self.model.train()
        with self.autocast():
            logits = self.model(x)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        rate, scale = self.optimizer.param_groups[0]["lr"], self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the gradients were not finite and nothing was updated
            self.schedule.step()
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) != labels).sum()]).double()
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            self._end_epoch(rate)

    def autocast(self) -> torch.autocast:
        """The context that the network is called in."""
        dtype = AMP[self.recipe.amp]
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def _begin_epoch(self) -> None:
        self.order_at_begin = self.order.get_state()
        self.permutation = torch.randperm(len(self.data.train.labels), generator=self.order)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of losses, and of wrong answers

    def _end_epoch(self, rate: float) -> None:
        """The row: loss and error over the epoch's batches as they were trained on, and error on the test images."""
        seen = self.steps_per_epoch * self.recipe.batch
        loss, wrong = (self._added(self.sums) / seen).tolist()
        self.rows.append(
            {
                "epoch": self.steps // self.steps_per_epoch,
                "step": self.steps,
                "rate": rate,
                "train_loss": loss,
                "train_error": 100 * wrong,
                "test_error": self.error(self.data.test),
            }
        )
        self._begin_epoch()

    @torch.no_grad()
    def error(self, images: Images) -> float:
        """Percentage of ``images`` that the network names wrongly, in eval mode."""
        rank, size, _ = self.world
        if size > 1:  # every process has its own running statistics; the first one's count
            for buffer in self.network.buffers():
                distributed.broadcast(buffer, 0)
        self.network.eval()
        wrong = torch.zeros(1, dtype=torch.float64, device=self.device)
        for index in torch.arange(len(images.labels))[rank::size].split(_TEST_BATCH):
            x, labels = images.batch(index)
            with self.autocast():
                wrong += (self.network(x).argmax(1) != labels).sum()
        return 100 * self._added(wrong).item() / len(images.labels)

    def _added(self, t: Tensor) -> Tensor:
        """``t`` summed over all processes."""
        t = t.clone()
        if self.world.size > 1:
            distributed.all_reduce(t)
        return t

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on; every process must ask, and gets the states of all."""
        own = {"random": checkpoints.random_state(self.device), "sums": self.sums.cpu()}
        ranks: list[Any] = [own]
        if self.world.size > 1:
            ranks = [None] * self.world.size
            distributed.all_gather_object(ranks, own)
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order_at_begin,
            "crops": self.crops.get_state(),
            "steps": self.steps,
            "rows": self.rows,
            "ranks": ranks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state` was called.

        Raises:
            UsageError: there were more or fewer processes.
        """
        if len(state["ranks"]) != self.world.size:
            raise UsageError(
                f"argument --resume: expected a checkpoint of {self.world.size} processes, got {len(state['ranks'])}"
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.crops.set_state(state["crops"])
        self._begin_epoch()
        self.steps, self.rows = state["steps"], list(state["rows"])
        own = state["ranks"][self.world.rank]
        self.sums.copy_(own["sums"])
        checkpoints.set_random_state(own["random"], self.device)
