import numpy as np
import pytest

from data_tools.__main__ import DEMO_ASSETS
from lrm_pl.data.manifest import read_index, read_manifest
from lrm_pl.data.schema import decode_image, decode_sample


@pytest.mark.blender
@pytest.mark.slow
def test_demo_objects_cover_a_moderate_part_of_the_views(render_command, tmp_path):
    """The PSNR of a white image, pooled over the 16 default views of each object, is 8 to 18 dB."""
    render_command(DEMO_ASSETS, tmp_path / "out", "--res", "64", "--samples", "4")
    white = {}
    for shard in read_manifest(tmp_path / "out").shards:
        raw = (tmp_path / "out" / shard.name).read_bytes()
        for key, spans in read_index(tmp_path / "out", shard).items():
            sample = decode_sample(key, {name: raw[at : at + size] for name, (at, size) in spans.items()})
            rgba = np.stack([decode_image(key, view) for view in sample.views]) / 255
            darkness = rgba[..., 3:] * (1 - rgba[..., :3])  # white minus the view composited on white
            white[key] = float(-10 * np.log10((darkness**2).mean()))
    assert len(white) == 48
    print(f"white-image PSNR: {min(white.values()):.2f} to {max(white.values()):.2f} dB")
    assert {key: psnr for key, psnr in white.items() if not 8 <= psnr <= 18} == {}
