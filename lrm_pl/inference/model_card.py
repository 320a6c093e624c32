"""Model cards in Markdown, with metadata for the Hugging Face Hub."""

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
from lrm_pl import LRMPipeline

scene = LRMPipeline.from_pretrained("{name}")("photo.png")
mesh = scene.mesh()
```

or `lrm infer photo.png --ckpt {ckpt}`.
"""


def model_card(name: str, origin: str, model: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Return the text of a model card.

    Args:
        name: Name of the model.
        origin: Sentence that describes the origin of the weights.
        model: ``model`` section of the config.
        facts: Additional rows of the table.
    """
    lrm = model.get("lrm", {})
    encoder = lrm.get("encoder", {})
    size = {
        "encoder": f"{encoder.get('name', '-')} at {encoder.get('image_size', '-')} px",
        "transformer": f"{lrm.get('depth', 16)} blocks of width {lrm.get('dim', 1024)}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**size, **facts}.items())
    return (
        f"{_HEADER}\n# {name}\n\nA Large Reconstruction Model (arXiv 2311.04400): one image to a triplane NeRF.\n"
        f"{origin} Made with lrm_pl {__version__}.\n\n| | |\n|---|---|\n{rows}\n{_use(name)}"
    )


def _use(name: str) -> str:
    return _USE.format(name=name, ckpt=f"{HUB}{name}" if "/" in name else name)


def rename_model_card(card: str, name: str) -> str:
    """Replace the name of the model in a card that ``model_card`` created. Other cards are returned unchanged."""
    found = re.search(r'LRMPipeline\.from_pretrained\("([^"\n]+)"\)', card)
    if found is None or _use(found[1]) not in card:
        return card
    old = found[1]
    return card.replace(_use(old), _use(name)).replace(f"\n# {old}\n", f"\n# {name}\n")


def _describe_data(folder: str) -> str:
    """Return the name of a folder of shards, with the numbers of objects and views if the manifest can be read."""
    try:
        manifest = parse_manifest((Path(folder) / MANIFEST_NAME).read_bytes(), folder)
    except (OSError, InputError):
        return Path(folder).name
    count = sum(shard.samples for shard in manifest.split("train"))
    return f"{Path(folder).name}: {count} objects, {manifest.views} views each"


def weights_name(*, average: bool) -> str:
    """Return the label that reports use for the evaluated weights.

    Args:
        average: Whether the weights are the moving average.
    """
    return "model (average)" if average else "model"


def collect_run_facts(folder: Path, config: Mapping[str, Any], step: int, *, average: bool) -> dict[str, str]:
    """Collect the training data, the code version and the reported metrics of a run.

    Args:
        folder: Path of the run folder.
        config: Config of the run.
        step: Optimizer step of the weights.
        average: Whether the weights are the moving average.
    """
    facts = dict[str, str]()
    data, trainer = config.get("data") or {}, config.get("trainer") or {}
    if data.get("folder"):
        also = [entry.get("folder") for entry in data.get("also") or []]
        facts["trained on"] = "; ".join(_describe_data(str(each)) for each in [data["folder"], *also])
        facts["objects per step"] = str(data.get("batch_size"))
    if trainer.get("max_steps"):
        facts["steps"] = f"{trainer['max_steps']}, {trainer.get('precision')}"
    if (commit := folder / "commit.txt").is_file():
        facts["code"] = commit.read_text().strip()
    if (report := folder / "report.json").is_file():
        found = json.loads(report.read_text())
        measured = [found.pop(name, None) for name in ("step", "weights", "data")]
        if measured != [step, weights_name(average=average), data.get("folder")]:
            return facts  # the report describes different weights or different data
        for split, rows in found.items():
            scores = rows["model"]
            facts[f"{split} views"] = (
                f"PSNR {scores['psnr']:.2f}, SSIM {scores['ssim']:.3f}, LPIPS {scores['lpips']:.3f} "
                f"over {scores['images']} images"
            )
    return facts
