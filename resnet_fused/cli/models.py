"""MODEL on the command line: a name that torchvision or timm knows, or ``module:function``; and its seeded values."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.cli.output import UsageError

HELP = (
    "a name that torchvision or timm knows (torchvision first; prefix with `torchvision:` or `timm:` to force one), "
    "or `module:function`, a function that returns a module"
)


class Found(NamedTuple):
    """A MODEL that was found, not built yet."""

    source: str  # torchvision, timm, or the module's name
    build: Callable[[], Any]


class Loaded(NamedTuple):
    """A MODEL that was built."""

    model: nn.Module
    source: str
    values: str  # where its parameters come from, for a header


def find(name: str) -> Found:
    """What ``name`` stands for.

    Raises:
        UsageError: nothing; the text offers the nearest names, or the package to install.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix not in ("torchvision", "timm"):
        return _function(name, prefix, rest)
    wanted, packages = (rest, (prefix,)) if colon else (name, ("torchvision", "timm"))
    known: list[str] = []
    missing = []
    for package in packages:
        try:
            found = _FINDERS[package](wanted, known)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            missing.append(package)
            continue
        if found is not None:
            return found
    if missing:
        install = " ".join(missing)
        raise UsageError(
            f"expected {' and '.join(missing)} to be installed for MODEL {name!r}, got none; `pip install {install}`"
        )
    near = difflib.get_close_matches(wanted, sorted(set(known)), 3, 0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise UsageError(f"expected MODEL to be a model of {' or '.join(packages)}, or module:function, got {name!r}{hint}")


def _torchvision(name: str, known: list[str]) -> Found | None:
    from torchvision import models

    names = models.list_models()
    known += names
    if name not in names:
        return None
    # Composite models would download a backbone's weights unless told not to.
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    return Found("torchvision", lambda: models.get_model(name, **none))


def _timm(name: str, known: list[str]) -> Found | None:
    import timm

    known += timm.list_models()
    if not name or not timm.is_model(name):
        return None
    return Found("timm", lambda: timm.create_model(name, pretrained=False))


_FINDERS = {"torchvision": _torchvision, "timm": _timm}


def _function(name: str, module: str, function: str) -> Found:
    expected = "expected MODEL to be module:function with"
    if os.getcwd() not in sys.path:  # as `python -m` has it, so that a user's own file is found by both entry points
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{expected} a module that can be imported, got {name!r} ({error})") from error
    except (ValueError, TypeError) as error:  # empty or relative names
        raise UsageError(f"{expected} a module's full name, got {name!r} ({error})") from error
    target = getattr(found, function, None) if function else None
    if not callable(target):
        public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function, public, 3, 0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"{expected} a function of that module, got {name!r}{hint}")
    return Found(module, (lambda: target) if isinstance(target, nn.Module) else target)


def load(name: str, *, seed: int, batch: int, size: int) -> Loaded:
    """Build MODEL on the CPU in fp32; one of a package gets :func:`seeded` values, one's own stays as it is.

    Raises:
        UsageError: MODEL cannot be found, built, or called with images of ``(batch, 3, size, size)``.
    """
    found = find(name)
    torch.manual_seed(seed)
    try:
        model = found.build()
    except Exception as error:  # whatever a model's own constructor raises is about the input
        raise UsageError(
            f"expected MODEL {name!r} to be built without arguments, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected MODEL {name!r} to return an nn.Module, got {type(model).__name__}")
    if found.source not in _FINDERS:
        return Loaded(model, found.source, "as the function returns them")
    try:
        seeded(model, images(batch, size, seed), seed)
    except Exception as error:
        raise UsageError(
            f"expected MODEL {name!r} to take images of shape ({batch}, 3, {size}, {size}), "
            f"got {type(error).__name__}: {error}"
        ) from error
    return Loaded(model, found.source, f"random, seed {seed}")


def images(batch: int, size: int, seed: int, *, channels: int = 3) -> Tensor:
    """Normally distributed images (batch, channels, size, size), fp32, from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, channels, size, size, generator=generator)


@torch.no_grad()
def seeded(model: nn.Module, x: Tensor, seed: int) -> None:
    """Give the batch norms of a randomly initialised ``model`` values like a trained network's, in place.

    A fresh network is a poor test: gamma = 1 and beta = 0 hide a swapped or dropped term, gamma = 0 at the end of a
    block (timm) switches the block off, and running statistics of 0 and 1 let activations grow a thousandfold. So
    gamma is drawn from [0.8, 1.2], at the end of a residual block from [0.2, 0.4] (which keeps the gradient of a deep
    network well-conditioned), and the running statistics are those of ``x``. beta is 2 to 3 gamma, of random sign: most
    values then lie away from the ReLU's kink at 0, where the gradient jumps and an error of rounding becomes one of
    1e-3, and a few hundred of every 10,000 are still on the other side than their channel.
    """
    model_copy = copy.deepcopy(model)
    twin = resnet_fused.fuse(model_copy)
    ends = {id(block._chain()[-1][1]) for block in twin.modules() if isinstance(block, FusedResidual)}
    generator = torch.Generator().manual_seed(seed + 2)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                low, high = (0.2, 0.4) if id(module) in ends else (0.8, 1.2)
                module.weight.uniform_(low, high, generator=generator)
                distance = torch.empty_like(module.bias).uniform_(2.0, 3.0, generator=generator)
                sign = torch.empty_like(module.bias).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                module.bias.copy_(module.weight * distance * sign)
            module.momentum = 1.0
    with resnet_fused.disabled():
        twin.train()(x)
    model.load_state_dict(twin.state_dict())


def wants_blocks(name: str, model: nn.Module) -> resnet_fused.Report:
    """The report of a fused ``model``.

    Raises:
        UsageError: it has no residual block or stem that this package knows, so that there is nothing to compare.
    """
    report = resnet_fused.report(model)
    if not report.rows:
        raise UsageError(
            f"expected MODEL {name!r} to have residual blocks of torchvision, timm or resnet_fused, got none"
        )
    return report
