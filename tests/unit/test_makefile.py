"""Commands that `make` runs: values arrive as single words, and the environment has no effect."""

import os
import re
import shlex
import subprocess

import pytest


@pytest.fixture
def typed(root, tmp_path):
    """Return a function that returns the words of the last command that make would run, and its other lines."""
    (tmp_path / "Makefile").write_bytes((root / "Makefile").read_bytes())
    for name in ("pyproject.toml", "data_tools/requirements.txt", ".venv/ready", ".venv-render/ready"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(*words, **environment):
        done = subprocess.run(
            ["make", "-n", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env=outside | environment,
        )
        *before, last = done.stdout.replace("\\\n", " ").splitlines()
        return shlex.split(last), before

    return run


def test_environment_variables_do_not_change_the_command(typed):
    names = "CONFIG DATA ARGS PYTHON ASSETS OUT VIEWS RES SAMPLES JOBS NODES GPUS STRATEGY CKPT IMAGE PROTOCOL BENCH"
    leaked = dict.fromkeys(names.split(), "leaked")
    for target in ("train", "doctor", "evaluate", "render-shards", "bench"):
        assert typed(target, **leaked) == typed(target), target


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train", "NODE=8"), "found NODE"),
        (("train", "NODES=8", "DRYRUN=1"), "found DRYRUN"),
        (("train", "nodes=8"), "found nodes"),
        (("tensorboard", "DATA=x"), "found DATA"),
        (("infer", "evaluate", "IMAGE=a.png", "DATA=x", "GPUS=2"), "found GPUS"),
        (("infer", "IMAGE=a.png", "DATA=data/mine"), "found DATA"),
        (("render-shards", "PROCESSES=4"), "found PROCESSES"),
        (("lint", "ARGS=x"), "expected no variables"),
    ],
)
def test_an_unknown_variable_of_a_target_is_rejected(typed, words, named):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        typed(*words)
    assert named in refused.value.stderr


@pytest.mark.parametrize(
    "words", [("train", "DATA="), ("render-shards", "ASSETS=", "OUT=x"), ("infer", "CKPT=")]
)
def test_a_variable_without_a_value_is_rejected(typed, words):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        typed(*words)
    assert f"{words[1]} has no value" in refused.value.stderr
    assert typed("train", "DATA=x", "ARGS=") == typed("train", "DATA=x")


def test_a_variable_is_accepted_if_one_of_the_targets_accepts_it(typed):
    assert typed("train", "doctor", "NAME=mine", "NODES=2", "PYTHON=python3.12")
    words, _ = typed("doctor", "NODES=2", "STRATEGY=fsdp2")
    assert words[2:] == ["--nodes=2", "-c=configs/experiment/demo.yaml", "-c=configs/trainer/fsdp2.yaml"]


@pytest.mark.parametrize("path", ["my meshes", "it's", "a$$b", 'two "quotes"', "a;id", "ä(1)"])
def test_a_path_with_special_characters_is_passed_as_one_word(typed, path, tmp_path):
    meant = path.replace("$$", "$")  # make escapes a dollar sign as two dollar signs
    assert f"--assets={meant}" in typed("render-shards", f"ASSETS={path}", "OUT=out")[0]
    assert f"--out={meant}" in typed("render-shards", "ASSETS=in", f"OUT={path}")[0]
    assert f"--data.folder={meant}" in typed("train", f"DATA={path}")[0]
    assert f"--data={meant}" in typed("train", f"DATA={path}", "NODES=2")[0]
    assert f"--data={meant}" in typed("evaluate", f"DATA={path}")[0]
    assert f"--ckpt={meant}" in typed("evaluate", f"CKPT={path}")[0]
    (tmp_path / meant).touch()
    assert typed("infer", f"IMAGE={path}")[0][2:] == [meant]
    assert typed("train", f"CONFIG={path}")[0][2:] == [f"-c={meant}"]


def test_images_and_patterns_are_passed_as_separate_words(typed):
    assert typed("infer", "IMAGE=a.png in/*.png")[0][2:] == ["a.png", "in/*.png"]
    assert typed("infer", "IMAGE=nosuch.png")[0][2:] == ["nosuch.png"]


def test_unset_variables_add_no_options(typed):
    words, _ = typed("train", "CONFIG=mine.yaml")
    assert words == [".venv/bin/lrm", "fit", "-c=mine.yaml"]
    words, _ = typed("train", "CONFIG=mine.yaml", "NODES=2", "GPUS=8")
    assert words == [".venv/bin/lrm", "launch", "--nodes=2", "--gpus=8", "-c=mine.yaml", "--"]
    words, _ = typed("train", "CONFIG=one.yaml two.yaml", "DATA=s3://bucket/mine")
    assert words == [".venv/bin/lrm", "fit", "-c=one.yaml", "-c=two.yaml", "--data.folder=s3://bucket/mine"]


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ((), True),
        (("DATA=data/demo",), True),
        (("CONFIG=mine.yaml", "DATA=data/demo"), True),
        (("DATA=data/mine",), False),
        (("CONFIG=mine.yaml",), False),
        (("DATA=s3://bucket/mine",), False),
        (("DRY_RUN=1", "NODES=2"), False),
    ],
)
def test_the_demo_shards_are_rendered_only_if_the_run_trains_on_them(typed, words, made):
    _, before = typed("train", *words)
    assert any("data_tools render --out data/demo" in line for line in before) == made


def test_make_accepts_the_variables_in_every_readme(typed, root):
    texts = [path.read_text() for path in (root / "README.md", *root.glob("lrm_pl/*/README.md"))]
    lines = re.findall(r"\bmake [a-z-]+(?: [A-Z]+=(?:\"[^\"]*\"|\S+))+", "\n".join(texts))
    assert len(lines) > 5
    for line in lines:
        typed(*shlex.split(line.rstrip("`,.;)"))[1:])
