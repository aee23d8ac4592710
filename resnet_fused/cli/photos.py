"""The demo's network and photographs: torchvision's resnet50 on the two that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.cli import models

TOP = 5


class Photo(NamedTuple):
    """One photograph as the network takes it."""

    name: str
    views: (
        Tensor  # (4, 3, 224, 224) fp32: the whole, mirrored, its left and its right half; torchvision's preprocessing
    )


class Network(NamedTuple):
    """torchvision's resnet50, in eval mode."""

    model: nn.Module
    pretrained: bool
    origin: str  # where its parameters come from
    categories: list[str]  # names of the 1000 classes


class Answer(NamedTuple):
    """What the network says to one photograph."""

    photo: str
    classes: list[str]  # the TOP most probable, of the fused network
    fused: list[float]  # their probabilities
    unfused: list[float]
    same: bool  # both have the same classes in the same order
    difference: float  # greatest between any two of the 1000 probabilities


def load() -> list[Photo]:
    """Both photographs through the preprocessing of torchvision's weights."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from torchvision.models import ResNet50_Weights

    transform = ResNet50_Weights.DEFAULT.transforms()
    found = load_sample_images()
    photos = []
    for name, pixels in zip(found.filenames, found.images, strict=True):
        middle = pixels.shape[1] // 2
        views = (pixels, pixels[:, ::-1], pixels[:, :middle], pixels[:, middle:])
        stacked = torch.stack([transform(Image.fromarray(view.copy())) for view in views])
        photos.append(Photo(Path(name).name, stacked))
    return photos


def small(photos: list[Photo], size: int, draw: int) -> Tensor:
    """Each whole photograph and its mirror image at ``size``; another frame for every ``draw``: (4, 3, size, size)."""
    frame = slice(8 * (draw % 8), None)
    views = torch.cat([photo.views[:2, :, frame, frame] for photo in photos])
    return F.interpolate(views, (size, size), mode="bilinear", antialias=True)


def network(photos: list[Photo], seed: int) -> Network:
    """resnet50 with pretrained weights if torch's hub cache holds them, else seeded ones; nothing is downloaded."""
    from torchvision.models import ResNet50_Weights, resnet50

    categories = list(ResNet50_Weights.DEFAULT.meta["categories"])
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for weights in (ResNet50_Weights.IMAGENET1K_V2, ResNet50_Weights.IMAGENET1K_V1):
        file = folder / weights.url.rpartition("/")[2]
        if file.is_file():
            model = resnet50(weights=None)
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            return Network(model.eval(), True, f"pretrained, {weights} from {file}", categories)
    torch.manual_seed(seed)
    model = resnet50(weights=None)
    models.seeded(model, torch.cat([photo.views for photo in photos]), seed)
    origin = (
        f"no pretrained weights in {folder}, so a random initialisation with seed {seed}, its norms calibrated on "
        "these photographs: the classes below mean nothing, only that both networks agree does"
    )
    return Network(model.eval(), False, origin, categories)


@torch.no_grad()
def classify(fused: nn.Module, unfused: nn.Module, photos: list[Photo], categories: list[str]) -> list[Answer]:
    """The answers of both networks to each whole photograph."""
    batch = torch.stack([photo.views[0] for photo in photos])
    answers = []
    for photo, p, q in zip(photos, _probabilities(fused, batch), _probabilities(unfused, batch), strict=True):
        top, other = p.topk(TOP).indices, q.topk(TOP).indices
        answers.append(
            Answer(
                photo.name,
                [categories[i] for i in top.tolist()],
                p[top].tolist(),
                q[top].tolist(),
                torch.equal(top, other),
                (p - q).abs().max().item(),
            )
        )
    return answers


def _probabilities(model: nn.Module, batch: Tensor) -> Tensor:
    return model.eval()(batch).double().softmax(1)


def stages(report: resnet_fused.Report) -> list[dict[str, Any]]:
    """The report's rows by stage: layer1, ... and the stem."""
    found: dict[str, dict[str, Any]] = {}
    for row in report.rows:
        name = row.name.partition(".")[0] or "stem"
        entry = found.setdefault(name, {"name": name, "kind": row.kind, "count": 0, "fused": 0, "backends": {}})
        entry["count"] += 1
        entry["fused"] += row.status == "fused"
        entry["backends"].update(row.backends)
    return list(found.values())
