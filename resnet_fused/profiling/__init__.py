"""Where the time of a model goes: ranges around blocks and ops, and the tables that profilers' results become."""

from __future__ import annotations
