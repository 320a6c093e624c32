"""The model card of a trained network: Markdown with a header that the Hugging Face hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrm_pl import __version__
from lrm_pl.data.manifest import MANIFEST_NAME, parse_manifest
from lrm_pl.errors import InputError
from lrm_pl.storage import HUB

_HEADER = """---
library_name: lrm_pl
pipeline_tag: image-to-3d
tags:
- image-to-3d
- lrm
- triplane
---
"""

_USE = """
## Use

```python
from lrm_pl import LRM

scene = LRM.from_pretrained("{name}")("photo.png")
mesh = scene.mesh()
```

or `lrm infer photo.png --ckpt {ckpt}`.
"""


def model_card(name: str, origin: str, model: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Write a card.

    Args:
        name: What the network is called.
        origin: A sentence that says where it comes from.
        model: The model section of its config.
        facts: What else is known, a row each.
    """
    lrm = model.get("lrm", {})
    encoder = lrm.get("encoder", {})
    size = {
        "encoder": f"{encoder.get('name', '-')} at {encoder.get('image_size', '-')} px",
        "transformer": f"{lrm.get('depth', 16)} blocks of width {lrm.get('dim', 1024)}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**size, **facts}.items())
    return (
        f"{_HEADER}\n# {name}\n\nA Large Reconstruction Model (arXiv 2311.04400): an image in, a triplane NeRF out.\n"
        f"{origin} Made with lrm_pl {__version__}.\n\n| | |\n|---|---|\n{rows}\n{_use(name)}"
    )


def _use(name: str) -> str:
    return _USE.format(name=name, ckpt=f"{HUB}{name}" if "/" in name else name)


def renamed(card: str, name: str) -> str:
    """Call the network of a card by another name, where it is one that ``model_card`` wrote."""
    found = re.search(r'LRM\.from_pretrained\("([^"\n]+)"\)', card)
    if found is None or _use(found[1]) not in card:
        return card
    old = found[1]
    return card.replace(_use(old), _use(name)).replace(f"\n# {old}\n", f"\n# {name}\n")


def _data(folder: str) -> str:
    """Say what is in a folder of shards, where it can be read from here, under the last part of its name."""
    try:
        manifest = parse_manifest((Path(folder) / MANIFEST_NAME).read_bytes(), folder)
    except (OSError, InputError):
        return Path(folder).name
    count = sum(shard.samples for shard in manifest.split("train"))
    return f"{Path(folder).name}: {count} objects, {manifest.views} views each"


def weights_name(*, average: bool) -> str:
    """Return what a report calls the weights that it measured."""
    return "model (average)" if average else "model"


def run_facts(folder: Path, config: Mapping[str, Any], step: int, *, average: bool) -> dict[str, str]:
    """Collect what a run's folder knows: its commit, what it trained on, what its report measured of these weights.

    Args:
        folder: The run's folder.
        config: Its config.
        step: The step of the weights.
        average: Whether they are the moving average.
    """
    facts = dict[str, str]()
    data, trainer = config.get("data") or {}, config.get("trainer") or {}
    if data.get("folder"):
        also = [entry.get("folder") for entry in data.get("also") or []]
        facts["trained on"] = "; ".join(_data(str(place)) for place in [data["folder"], *also])
        facts["objects a step"] = str(data.get("batch_size"))
    if trainer.get("max_steps"):
        facts["steps"] = f"{trainer['max_steps']}, {trainer.get('precision')}"
    if (commit := folder / "commit.txt").is_file():
        facts["code"] = commit.read_text().strip()
    if (report := folder / "report.json").is_file():
        found = json.loads(report.read_text())
        what = [found.pop(name, None) for name in ("step", "weights", "data")]
        if what != [step, weights_name(average=average), data.get("folder")]:
            return facts  # of another step, of the weights in place of their average, or on other data
        for split, rows in found.items():
            scores = rows["model"]
            facts[f"{split} views"] = (
                f"PSNR {scores['psnr']:.2f}, SSIM {scores['ssim']:.3f}, LPIPS {scores['lpips']:.3f} "
                f"over {scores['images']} images"
            )
    return facts
