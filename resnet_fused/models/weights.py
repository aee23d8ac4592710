"""torchvision's weight enums; torchvision itself is imported only when weights are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


def resolve_weights(factory: str, enum_name: str, weights: WeightsEnum | str | None) -> WeightsEnum | None:
    """The member of ``torchvision.models.<enum_name>`` that ``weights`` is or names; None stays None."""
    if weights is None:
        return None
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(
            f"{factory}: expected torchvision to be installed for weights={weights!r}, got {error}; "
            "`pip install torchvision`, or pass weights=None and load a state_dict"
        ) from error
    enum = getattr(torchvision.models, enum_name)
    if isinstance(weights, enum):
        return weights
    names = ", ".join(enum.__members__)
    expected = f"{factory}: expected weights to be None, a member of {enum_name} ({names}) or the name of one"
    if not isinstance(weights, str):
        raise TypeError(f"{expected}, got {weights!r} ({type(weights).__name__})")
    name = weights.removeprefix(f"{enum_name}.")
    if name not in enum.__members__:
        raise ValueError(f"{expected}, got {weights!r}")
    return enum[name]
