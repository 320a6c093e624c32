"""Stand-in for ``data_tools.blender.worker``. The text in a mesh file determines the result."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_tools.quality.measures import Measures, encode_measures
from data_tools.rendering.cameras import PRESETS, derive_seed, draw_cameras
from lrm_pl.data.schema import Sample, SampleInfo, encode_image, encode_sample

MEASURES = Measures(
    triangles=12,
    degenerate=0.0,
    doubled=0.0,
    one_sided=False,
    size=1.0,
    thinness=1.0,
    materials=1,
    colored=True,
    textures=0,
    missing_textures=0,
    animated=False,
    hidden=0,
    cameras=0,
    lights=0,
    coverage=0.5,
    coverage_min=0.5,
    cropped=0.0,
    white=0.0,
    black=0.0,
)


def sample_members(asset, text, views, served=0):
    """Return the members of the sample of an asset, where ``text`` is the content of the mesh."""
    seed = derive_seed(0, asset["id"])
    cameras = draw_cameras(PRESETS["frame"], views, np.random.default_rng(seed))
    image = encode_image(np.full((8, 8, 4), seed % 256, dtype=np.uint8))
    listed = {name: asset[name] for name in ("id", "name", "license", "creator", "source")}
    same = text in ("dies once", "waits", "bad once")  # the bytes are compared with those of "fine"
    sha256 = hashlib.sha256(b"fine" if same else text.encode()).hexdigest()
    recorded_seed = served if text == "counts" else seed
    info = SampleInfo(**listed, seed=recorded_seed, renderer="stand-in", views=views, sha256=sha256)
    measures = dataclasses.replace(MEASURES, white=1.0 if text == "white" else 0.0)
    extras = {"measures.json": encode_measures(measures)}
    return encode_sample(Sample(info, cameras.c2w, cameras.fxfycxcy, (image,) * views, extras))


def serve():
    responses = Connection(os.dup(sys.stdout.fileno()), readable=False)

    def answer(record, members):
        responses.send_bytes(json.dumps(record | {"members": list(members)}).encode())
        for content in members.values():
            responses.send_bytes(content)

    setup = json.loads(sys.stdin.readline())
    views = setup["settings"]["views"]
    fails = Path(setup["assets"]) / "one start fails"
    if fails.exists() and (Path(setup["assets"]) / "started").exists():
        fails.unlink()
        os.abort()
    (Path(setup["assets"]) / "started").touch()
    answer({"renderer": "stand-in"}, {})
    served = 0
    for line in sys.stdin:
        asset = json.loads(line)
        folder = Path(setup["assets"])
        text = (folder / asset["file"]).read_text()
        served += 1
        outcome = {"status": "done", "reason": "", "cycles_s": 0.0}
        mended = (folder / "mended").exists()
        if text == "dies" or (text == "dies once" and not mended):
            (folder / "mended").touch()
            sys.stderr.write("about to die\n")
            sys.stderr.flush()
            os.abort()
        if text == "waits":
            (folder / f"{asset['id']}.working").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        if text == "slow":
            time.sleep(60)
        if text == "stops in a response":
            responses.send_bytes(json.dumps(outcome | {"members": ["000.png"]}).encode())
            time.sleep(60)
        if text == "hungry":
            held = np.ones(60_000_000)  # 480 MB
            time.sleep(60)
            del held
        if text == "bad" or (text == "bad once" and not mended):
            sys.stderr.write("what Blender says\n")
            sys.stderr.flush()
            answer(outcome | {"status": "failed", "reason": "is bad"}, {})
        elif text == "unreachable" and not mended:
            answer(outcome | {"status": "unreachable", "reason": "no route to host"}, {})
        elif asset["id"] == "e" and (folder / "full").exists():
            answer(outcome | {"status": "no space", "reason": "No space left on device"}, {})
        else:
            answer(outcome, sample_members(asset, text, views, served))
    shutil.rmtree(Path(setup["scratch"]).parent)


if __name__ == "__main__":
    serve()
