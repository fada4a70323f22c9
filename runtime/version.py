"""The version of everything here, Python and C++."""

from pathlib import Path

__version__ = Path(__file__).with_name("VERSION").read_text().strip()
