"""Tests of exported weights and model cards."""

import os

import pytest
import yaml
from safetensors.torch import load_file

from lrm_pl import LRMPipeline
from lrm_pl.apps.export import main as export
from lrm_pl.checkpoints.index import newest_checkpoint
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.errors import InputError
from tests.integration.checkpoint_runs import AVERAGE, keeper, read, same

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


def test_exported_weights_equal_the_checkpoint_and_load_strictly(fit, tmp_path, capsys):
    folder = fit("run", 2, keeper(), AVERAGE)
    checkpoint = newest_checkpoint(f"{folder}/checkpoints", print)
    tensors = read(checkpoint)
    network = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    average = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
    assert average
    assert not same(average, {name: network[name] for name in average})

    export([str(folder), str(tmp_path / "weights")])
    export([checkpoint.path, str(tmp_path / "average"), "--average"])
    export([checkpoint.path, str(tmp_path / "half"), "--dtype", "bf16"])
    assert same(load_file(tmp_path / "weights" / "model.safetensors"), network)
    assert same(load_file(tmp_path / "average" / "model.safetensors"), network | average)
    opened = LRMPipeline.from_pretrained(folder, average=True)
    assert same(opened.network.state_dict(), network | average)
    assert opened.source == f"{checkpoint.path} (moving average)"
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert same(half, {name: t.bfloat16() if t.is_floating_point() else t for name, t in network.items()})
    assert sorted(os.listdir(tmp_path / "weights")) == [
        "README.md",
        "config.yaml",
        "input.yaml",
        "model.safetensors",
    ]
    printed = capsys.readouterr().out
    assert f"lrm validate -c {folder / 'config.yaml'} --ckpt_path {checkpoint.path}" in printed
    assert printed.count("lrm validate") == 2, (
        "the command is printed only if it measures the exported weights"
    )

    for place in (folder, checkpoint.path):
        opened = LRMPipeline.from_pretrained(place)
        assert same(opened.network.state_dict(), network)
        assert opened.step == 2
    assert LRMPipeline.from_pretrained(str(tmp_path / "weights")).step == 2

    card = (tmp_path / "weights" / "README.md").read_text()
    assert ": 4 objects, 8 views each |" in card, "the card contains no local paths"

    config = tmp_path / "weights" / "config.yaml"
    assert list(yaml.safe_load(config.read_text())) == ["model"]
    cli = LRMCLI("fit", ["-c", str(config), "--trainer.accelerator", "cpu"], records=False)
    cli.model.lrm.load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"), strict=True)


def test_the_model_card_contains_the_metrics_of_the_exported_weights_only(fit, tmp_path):
    folder = fit("run", 2, keeper(every=1), AVERAGE)
    for name, arguments, scores in (
        ("last", [str(folder)], 2),
        ("before", [f"{folder}/checkpoints/step-00000001"], 0),
        ("average", [str(folder), "--average"], 0),
    ):
        export([arguments[0], str(tmp_path / name), *arguments[1:]])
        assert (tmp_path / name / "README.md").read_text().count(" views | PSNR ") == scores


def test_an_invalid_export_is_rejected_and_writes_nothing(fit, tmp_path):
    folder = fit("run", 2, keeper())
    out = tmp_path / "out"
    (tmp_path / "weights.pth").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    with pytest.raises(
        SystemExit, match=r"expected a moving average of the weights, but found none.*Omit --average"
    ):
        export([str(folder), str(out), "--average"])
    with pytest.raises(
        InputError, match=r"expected a moving average of the weights, but found none.*Omit --average"
    ):
        LRMPipeline.from_pretrained(str(folder), average=True)
    for file, message in (
        (
            tmp_path / "nothing",
            "found nothing at .*nothing. Correct the path",
        ),
        (
            folder / "config.yaml",
            "found a file. Pass the folder of a checkpoint, or convert published weights",
        ),
        (tmp_path / "begun", "found a run without checkpoints. Wait until"),
        (
            tmp_path / "exported",
            "found an exported network. Start from it with `lrm fit --weights.network",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            export([str(file), str(out)])
    (folder / "config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(SystemExit, match=r"expected the config of the run .*--config RUN/config\.yaml"):
        export([str(folder), str(out)])
    (tmp_path / "other.yaml").write_text("data: {}\n")
    with pytest.raises(SystemExit, match=r"expected a model\.lrm section"):
        export([str(folder), str(out), "--config", str(tmp_path / "other.yaml")])
    assert not list(tmp_path.glob("out*"))
    export([str(folder), str(out), "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit, match=r"The folder .*out cannot be created because it exists"):
        export([str(folder), str(out), "--config", str(tmp_path / "config.yaml")])
