"""Tests; see tests/README.md."""

from pathlib import Path

#: Root of the repository.
ROOT = Path(__file__).resolve().parents[1]
