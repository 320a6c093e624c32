"""Check the shapes in the signatures of ``lrm_pl`` while tests run."""

import re
from pathlib import Path

from jaxtyping import install_import_hook


def modules_with_shapes(root: Path) -> list[str]:
    """Return the modules under ``root/lrm_pl`` that import jaxtyping.

    Functions that numba or Triton compile from their source cannot be wrapped; their modules import no jaxtyping.
    """
    files = sorted((root / "lrm_pl").rglob("*.py"))
    found = [file for file in files if re.search(r"^from jaxtyping import", file.read_text(), re.MULTILINE)]
    return [".".join(file.relative_to(root).with_suffix("").parts) for file in found]


def check_shapes() -> None:
    """Install the import hook for these modules. Call it before any of them is imported."""
    install_import_hook(modules_with_shapes(Path(__file__).resolve().parents[1]), "beartype.beartype")
