"""The README's guide, command by command as it is printed, on four meshes and with less of everything."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lrm_pl.__main__ import COMMANDS
from tests.parity.networks import randomized
from tests.parity.triposr import TripoSR

pytestmark = pytest.mark.slow

MESHES = ("lockedLocker.glb", "JapaneseLantern.glb", "armchair.glb", "augalas.glb")

#: Beginning of a command -> what is added so that it takes seconds: into ARGS of make, else at the end.
LESS = {
    "make render-shards": "--res 32 --samples 1 --views 16 --held-out 2",
    "make train": "--trainer.max_steps 2 --trainer.val_check_interval 2 --model.objective.lpips_start_step 2 "
    "--data.batch_size 2 --data.streams 2 --weights.pretrained false",
    "make evaluate": "--device cpu",
    "make infer": "--resolution 48 --frames 7 --size 32 --threshold 0.5",
    # the twin's size shows its heads no more than the published ones do
    ".venv/bin/lrm convert": "--heads 4 --encoder-heads 3 --image-size 64 --samples-per-ray 8",
    ".venv/bin/lrm fit": "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 2 --data.streams 2 "
    "--data.crop.low 16 --data.crop.high 32 --data.crop.size 16 --weights.source pypi --data.workers 0",
}


def commands(root):
    text = (root / "README.md").read_text()
    guide = text[text.index("## A guide") : text.index("## Your own meshes")]
    blocks = re.findall(r"```\n(.*?)```", guide, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def shortened(command):
    extra = next((more for start, more in LESS.items() if command.startswith(start)), "")
    if not command.startswith("make"):
        return f"{command} {extra}"
    words = shlex.split(command)
    given = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
    return shlex.join([*(word for word in words if not word.startswith("ARGS=")), f"ARGS={given} {extra}"])


def test_every_command_of_the_guide_exists(root, tmp_path):
    """Expand the targets of make without running them; look the commands of `lrm` up."""
    for name in ("Makefile", "configs", "data_tools", "lrm_pl", "pyproject.toml", ".venv-render"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / ".venv").symlink_to(os.path.dirname(os.path.dirname(sys.executable)))
    for command in commands(root):
        if command.startswith("make"):
            done = subprocess.run(
                ["bash", "-c", f"{command} --dry-run"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        else:
            assert command.split()[:1] == [".venv/bin/lrm"], command
            assert command.split()[1] in COMMANDS, command


@pytest.mark.soak
@pytest.mark.blender
@pytest.mark.timeout(600)
def test_every_command_of_the_guide_does_what_it_says(root, tmp_path):
    for name in ("Makefile", "configs", "data_tools", "lrm_pl", "tests", "pyproject.toml", ".venv-render"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / ".venv").symlink_to(os.path.dirname(os.path.dirname(sys.executable)))
    (tmp_path / "my_meshes").mkdir()
    for name in MESHES:
        shutil.copy(root / "data_tools" / "demo_assets" / name, tmp_path / "my_meshes")
    image = np.zeros((64, 64, 4), dtype=np.uint8)
    image[10:50, 20:40] = (180, 120, 60, 255)
    Image.fromarray(image).save(tmp_path / "photo.png")
    torch.save(randomized(TripoSR(), 0).state_dict(), tmp_path / "model.ckpt")
    listed = commands(root)
    assert len(listed) == 12
    for command in listed:
        done = subprocess.run(
            ["bash", "-c", shortened(command)], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{shortened(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for path in (
        "data/mine/manifest.json", "out/photo/mesh.glb", "model/model.safetensors", "model/README.md",
        "start/input.yaml", "evaluation/both/comparison.html", "tuned/config.yaml",
    ):  # fmt: skip
        assert (tmp_path / path).is_file(), path
