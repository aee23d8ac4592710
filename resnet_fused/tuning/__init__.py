"""Measured configurations: which backend and which tile sizes each op takes, one JSON table per GPU in `tables/`."""
