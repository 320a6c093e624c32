"""The configurations of configs/model with small sizes and unchanged options."""

import pytest
import yaml

from tests import ROOT

#: With small sizes, these configs differ from openlrm_small only in the name of the encoder.
REPEATED = ("openlrm_base", "openlrm_large")

MODELS = [
    pytest.param(path.stem, marks=[pytest.mark.soak] if path.stem in REPEATED else [])
    for path in sorted((ROOT / "configs/model").glob("*.yaml"))
]

#: Sizes by key. Other settings are unchanged. The width and depth of the decoder are unchanged because they determine
#: the renderer on a GPU.
SIZES = {
    ("lrm", "dim"): 32,  # blocks "triposr" need a multiple of 32
    ("lrm", "depth"): 2,
    ("lrm", "heads"): 2,
    ("lrm", "camera_dim"): 8,
    ("lrm", "plane_tokens"): 4,
    ("lrm", "decoder", "channels"): 4,
    ("renderer", "samples_per_ray"): 8,
    ("renderer", "importance_samples"): 4,
    ("objective", "lpips_start_step"): 0,
}

#: Weights of loss terms that a configuration omits.
TERMS = {"mse": 1.0, "lpips": 1.0, "mask": 0.05, "tv": 5e-4, "opacity": 0.01}


def shrunk(name):
    """Read the section ``model`` of a config, with small sizes and all loss terms."""
    config = yaml.safe_load((ROOT / "configs/model" / f"{name}.yaml").read_text())
    for place, size in SIZES.items():
        *sections, key = place
        section = config
        for part in sections:
            section = section[part]
        if section.get(key):
            section[key] = size
    encoder = config["lrm"]["encoder"]
    patch = 14 if "patch14" in encoder["name"] else 16
    encoder |= {"image_size": 2 * patch, "dim": 32, "depth": 2, "heads": 2}
    config["objective"] |= {
        term: weight for term, weight in TERMS.items() if not config["objective"].get(term)
    }
    return config
