"""Autograd functions, one per dataflow; they call ``ops`` alone."""

from __future__ import annotations
