"""Planted redundancy, see `compress.grow`."""

from compress.grow import grow  # noqa: F401
