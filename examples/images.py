"""Labelled images in memory: CIFAR-10's binary files, a synthetic stand-in for them, and scikit-learn's digits."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.cli import digits
from resnet_fused.cli.output import UsageError

CLASSES = 10
SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE
"""Bytes of one image of CIFAR-10: its label, then 1024 red, 1024 green and 1024 blue values, row by row."""
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
PADDING = 4


class Crops(NamedTuple):
    """What augmentation does to each of N images: where its window begins, and whether it is mirrored."""

    top: Tensor  # (N,) int64 in [0, 2 * PADDING]
    left: Tensor  # (N,)
    mirrored: Tensor  # (N,) bool

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Crops:
        """Uniform windows, half of the images mirrored."""
        top, left = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
        return cls(top, left, torch.rand(n, generator=generator) < 0.5)

    def share(self, rank: int, size: int) -> Crops:
        """Those of every ``size``-th image."""
        return Crops(*(t[rank::size] for t in self))

    def apply(self, x: Tensor) -> Tensor:
        """(N, C, H, W): zeros around ``x`` (N, C, H, W), a window of its size, mirrored or not."""
        n, _, h, w = x.shape
        top, left, mirrored = (t.to(x.device) for t in self)
        rows = top[:, None] + torch.arange(h, device=x.device)
        columns = torch.arange(w, device=x.device).expand(n, w)
        columns = left[:, None] + torch.where(mirrored[:, None], w - 1 - columns, columns)
        padded = F.pad(x, (PADDING,) * 4)
        index = torch.arange(n, device=x.device)[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Images(NamedTuple):
    """Images as a network takes them: ``(pixels - mean) / deviation``, in fp32."""

    pixels: Tensor  # (N, 3, H, W), uint8 or fp32
    labels: Tensor  # (N,) int64
    mean: Tensor  # broadcasts against (3, H, W)
    deviation: Tensor

    def batch(self, index: Tensor, crops: Crops | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), channels_last, and labels (N,) at ``index`` (N,)."""
        index = index.to(self.pixels.device)
        x = (self.pixels[index].float() - self.mean) / self.deviation
        if crops is not None:
            x = crops.apply(x)
        return x.contiguous(memory_format=torch.channels_last), self.labels[index]

    def to(self, device: torch.device) -> Images:
        return Images(*(t.to(device) for t in self))


class Dataset(NamedTuple):
    """Images to train on and to test on, and a sentence about them."""

    name: str
    train: Images
    test: Images

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.name, self.train.to(device), self.test.to(device))

    def crc32(self) -> int:
        """Of all pixels and labels."""
        found = 0
        for t in (*self.train[:2], *self.test[:2]):
            found = zlib.crc32(t.cpu().contiguous().numpy().tobytes(), found)
        return found


def cifar10(path: Path, normalise: str = "pixel") -> Dataset:
    """The binary version of CIFAR-10 in the folder ``path``, or in its ``cifar-10-batches-bin``.

    Args:
        normalise: "pixel": subtract each pixel's mean over the training images, and scale by 1/255 (the papers');
            "channel": subtract each channel's mean and divide by its deviation.

    Raises:
        UsageError: a file is missing, its length is not that of whole records, or a label is above 9.
    """
    inner = path / "cifar-10-batches-bin"
    path = inner if inner.is_dir() else path
    missing = [name for name in TRAIN_FILES + TEST_FILES if not (path / name).is_file()]
    if missing:
        raise UsageError(
            f"argument --data: expected {path} to hold the binary version of CIFAR-10, got no {', '.join(missing)}"
        )
    train, test = ([_read(path / name) for name in names] for names in (TRAIN_FILES, TEST_FILES))
    pixels, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    name = f"CIFAR-10 from {path}: {len(labels):,} training and {len(test[0][1]):,} test images"
    return _normalised(name, pixels, labels, *test[0], normalise)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 32, 32) uint8 and labels (N,) of one file."""
    content = bytearray(path.read_bytes())
    if not content or len(content) % RECORD:
        raise UsageError(
            f"argument --data: expected {path} to be records of {RECORD} bytes, 1 label and 3 x 32 x 32 values, "
            f"got {len(content):,} bytes, {len(content) % RECORD} too many"
        )
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) >= CLASSES:
        at = int((labels >= CLASSES).nonzero()[0])
        raise UsageError(f"argument --data: expected labels from 0 to 9 in {path}, got {labels[at]} in record {at}")
    return records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels


def synthetic(train: int, test: int, normalise: str = "pixel", seed: int = 0) -> Dataset:
    """A stand-in of CIFAR-10's shape: a smooth pattern for each class, moved about, and noise twice as strong."""
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(
        torch.randn(CLASSES, 3, 5, 5, generator=generator), (SIZE + 2 * PADDING,) * 2, mode="bicubic"
    )
    labels = torch.randint(CLASSES, (train + test,), generator=generator)
    top, left = torch.randint(2 * PADDING + 1, (2, train + test), generator=generator).tolist()
    clean = torch.stack(
        [patterns[c, :, i : i + SIZE, j : j + SIZE] for c, i, j in zip(labels.tolist(), top, left, strict=True)]
    )
    noisy = clean + 2 * torch.randn(clean.shape, generator=generator)
    pixels = (noisy * 32 + 127.5).clamp(0, 255).to(torch.uint8)
    name = f"SYNTHETIC images, not CIFAR-10: {CLASSES} random patterns with noise, "
    name += f"{train:,} to train on, {test:,} to test on"
    return _normalised(name, pixels[:train], labels[:train], pixels[train:], labels[train:], normalise)


def real_digits(size: int = 8) -> Dataset:
    """scikit-learn's digits, split and normalised as in ``python -m resnet_fused demo``, scaled to ``size`` pixels."""
    found = digits.load()
    mean, deviation = torch.zeros(1), torch.ones(1)
    x, test_x = (images.contiguous() for images in (found.x, found.test_x))
    if size != x.shape[-1]:
        x, test_x = (F.interpolate(images, (size, size), mode="bilinear") for images in (x, test_x))
    train, test = Images(x, found.y, mean, deviation), Images(test_x, found.test_y, mean, deviation)
    scaled = "" if size == 8 else f" scaled to {size}x{size}"
    counts = f"{len(train.labels):,} to train on, {len(test.labels):,} to test on"
    return Dataset(f"scikit-learn's handwritten digits, 8x8 pixels{scaled}: {counts}", train, test)


def _normalised(name: str, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, normalise: str) -> Dataset:
    """Means and deviations of the training images, in fp64, for both parts."""
    if normalise == "pixel":
        mean = torch.stack([x[:, c].double().mean(0) for c in range(3)]).float()
        deviation = torch.full((1,), 255.0)
    else:
        channels = [x[:, c].double() for c in range(3)]
        mean = torch.stack([c.mean() for c in channels]).float().view(3, 1, 1)
        deviation = torch.stack([c.std() for c in channels]).float().view(3, 1, 1)
    return Dataset(name, Images(x, y, mean, deviation), Images(test_x, test_y, mean, deviation))
