"""The bytes that an op must move and the arithmetic it must do: what a kernel's time is held against."""

from __future__ import annotations

from resnet_fused.traffic.contract import Traffic, of, parts
from resnet_fused.traffic.count import Count, Row, count
from resnet_fused.traffic.saved import saved_bytes

__all__ = ["Count", "Row", "Traffic", "count", "of", "parts", "saved_bytes"]
