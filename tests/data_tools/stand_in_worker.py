"""Answers like data_tools.blender_worker, without Blender: what a "mesh" says decides what becomes of it."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_tools.shard_folder import write_part
from data_tools.views import PRESETS, derive_seed, draw_cameras
from lrm_pl.data.schema import Sample, SampleInfo, encode_image


def answer(record):
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def serve():
    setup = json.loads(sys.stdin.readline())
    views = setup["settings"]["views"]
    answer({"renderer": "stand-in"})
    for line in sys.stdin:
        asset = json.loads(line)
        folder = Path(setup["assets"])
        text = (folder / asset["file"]).read_text()
        outcome = {"id": asset["id"], "outcome": "done", "reason": ""}
        if text == "dies":
            sys.stderr.write("about to die\n")
            sys.stderr.flush()
            os.abort()
        if text == "slow":
            time.sleep(60)
        if text == "bad" or (text == "bad once" and not (folder / "mended").exists()):
            answer(outcome | {"outcome": "failed", "reason": "is bad"})
        elif asset["id"] == "e" and (folder / "full").exists():
            answer(outcome | {"outcome": "no space", "reason": "No space left on device"})
        else:
            seed = derive_seed(0, asset["id"])
            cameras = draw_cameras(PRESETS["frame"], views, np.random.default_rng(seed))
            image = encode_image(np.full((8, 8, 4), seed % 256, dtype=np.uint8))
            info = SampleInfo(asset["id"], asset["name"], "", "", "", seed, "stand-in", views)
            write_part(Path(setup["out"]), Sample(info, cameras.c2w, cameras.fxfycxcy, (image,) * views))
            answer(outcome)


if __name__ == "__main__":
    serve()
