"""Configs and options of the command line: misspelled keys, interpolation, callbacks, presets."""

import lightning as L
import pytest
import yaml

from lrm_pl.__main__ import main as lrm
from lrm_pl.cli.fit_config import parse_fit
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import main
from lrm_pl.errors import InputError
from lrm_pl.training.checkpointing import CheckpointAndResume

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("section", "key"), [("model.objective", "lpipz"), ("model.objective", "lpip"), ("model.lrm", "dept")]
)
def test_a_misspelled_or_abbreviated_option_is_rejected(tiny, capsys, section, key):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *tiny, f"--{section}.{key}", "1"])
    assert stopped.value.code == 2
    output = capsys.readouterr().err.rpartition("error: ")[2]
    assert section in output
    assert key in output


def test_a_misspelled_key_in_a_config_file_is_rejected(tiny, tmp_path, capsys):
    for text, key in (("data: {bach_size: 4}", "bach_size"), ("model: {objective: {lpipz: 1}}", "lpipz")):
        (tmp_path / "typo.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main(["fit", *tiny, "-c", str(tmp_path / "typo.yaml")])
        assert key in capsys.readouterr().err


@pytest.mark.parametrize("where", ["config", "section"])
def test_a_duplicate_key_in_a_config_is_rejected_with_its_line_numbers(tiny, tmp_path, where):
    path = tmp_path / "twice.yaml"
    path.write_text(
        "trainer: {max_steps: 4}\n\ntrainer: {log_every_n_steps: 2}\n"
        if where == "config"
        else "lrm:\n  depth: 1\n  depth: 2\n"
    )
    with pytest.raises(InputError) as refused:
        parse_fit([*tiny, *(["-c", str(path)] if where == "config" else [f"--model={path}"])])
    key, lines = (
        ("trainer", "line 3 and on line 1") if where == "config" else ("depth", "line 3 and on line 2")
    )
    assert f"expected each key once, but found {key} on {lines}" in str(refused.value)
    assert where == "section" or str(path) in str(refused.value)


def test_an_unknown_command_is_rejected_and_help_lists_the_commands(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lrm", "predikt"])
    with pytest.raises(SystemExit):
        lrm()
    assert "expected one of fit, validate, test, predict" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["lrm", "--help"])
    with pytest.raises(SystemExit):
        lrm()
    assert "lrm fit -c configs/experiment/demo.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["'${trainer.max_steps}'", pytest.param("'${oc.env:LRM_TEST_STEPS}'", marks=pytest.mark.soak)]
)
def test_interpolations_in_a_config_are_resolved(tiny, tmp_path, monkeypatch, value):
    monkeypatch.setenv("LRM_TEST_STEPS", "3")
    (tmp_path / "own.yaml").write_text(
        f"model: {{objective: {{lpips_start_step: {value}}}}}\n"
        f"run: {{folder: '{tmp_path}/steps${{trainer.max_steps}}'}}\n"
    )
    arguments = [*tiny, "-c", str(tmp_path / "own.yaml"), "--trainer.max_steps=3"]
    assert parse_fit(arguments).model.objective.init_args.lpips_start_step == 3
    main(["fit", *arguments])
    assert (tmp_path / "steps3/checkpoints/step-00000003").is_dir()
    record = yaml.safe_load((tmp_path / "steps3/config.yaml").read_text())
    assert record["model"]["objective"]["init_args"]["lpips_start_step"] == 3


def test_callbacks_of_a_config_are_added_to_the_default_callbacks(tiny, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - lightning.pytorch.callbacks.LearningRateMonitor\n"
        "  - class_path: lightning.pytorch.callbacks.TQDMProgressBar\n    init_args: {refresh_rate: 5}\n"
    )
    cli = LRMCLI("fit", [*tiny, "-c", str(tmp_path / "own.yaml")], records=False)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"CheckpointAndResume", "ViewLogger", "LearningRateMonitor"} <= set(names)
    assert names.count("CheckpointAndResume") == 1
    assert "TQDMProgressBar" in names
    assert "ProgressBar" not in names


def test_a_default_callback_is_replaced_by_a_callback_of_the_config(tiny, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: lrm_pl.training.checkpointing.CheckpointAndResume\n    init_args: {every: 7}\n"
    )
    cli = LRMCLI("fit", [*tiny, "-c", str(tmp_path / "own.yaml")], records=False)
    (checkpointing,) = [c for c in cli.trainer.callbacks if isinstance(c, CheckpointAndResume)]
    assert checkpointing.every == 7


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks.every=7"],
        [
            "--trainer.callbacks+=lrm_pl.training.checkpointing.CheckpointAndResume",
            "--trainer.callbacks.every=7",
        ],
        ["-c", "added.yaml"],
    ],
)
def test_there_is_one_checkpoint_callback_however_it_is_configured(tiny, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "added.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "  - class_path: lrm_pl.training.checkpointing.CheckpointAndResume\n    init_args: {every: 7}\n"
        "  - lrm_pl.training.ema.WeightAverage\n"
    )
    cli = LRMCLI("fit", [*tiny, *options], records=False)
    assert [c.every for c in cli.trainer.callbacks if isinstance(c, CheckpointAndResume)] == [7]
    assert len(cli.trainer.callbacks) == 7 + ("-c" in options)


def test_the_timer_of_lightning_is_supported_and_saved_in_the_config(tiny, tmp_path):
    limit = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    main(["fit", *tiny, *limit, "--run.folder", str(tmp_path / "run")])
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    timer = record["trainer"]["callbacks"][-1]
    assert timer["class_path"] == "lightning.pytorch.callbacks.Timer"
    assert timer["init_args"]["interval"] == "step"


def _fields(section, above=()):
    for name, value in section.items():
        yield from _fields(value, (*above, name)) if isinstance(value, dict) else [(*above, name)]


def test_a_model_config_overrides_every_field_of_another(root):
    presets = {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((root / "configs/model").glob("*.yaml"))
    }
    every = {field for preset in presets.values() for field in _fields(preset)}
    left = {(name, *field) for name, preset in presets.items() for field in every - set(_fields(preset))}
    assert not left, "fields that a preset does not set would keep the values of another preset"
    preset = f"--model={root / 'configs/model/openlrm_small.yaml'}"
    demo = parse_fit(["-c", str(root / "configs/experiment/demo.yaml"), preset])["model"]
    assert demo == parse_fit([preset])["model"]


@pytest.mark.parametrize("option", ["--optimizer=SGD", "--lr_scheduler=CosineAnnealingLR"])
def test_options_of_lightning_for_unused_optimizers_are_rejected(tiny, option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *tiny, option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_the_validation_interval_counts_optimizer_steps_with_accumulated_batches(tiny, tmp_path):
    options = ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2"]
    cli = LRMCLI("fit", [*tiny, *options, "--trainer.max_steps=4"], records=False)
    steps = []

    class Note(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            steps.append(trainer.global_step)

    cli.trainer.callbacks.append(Note())
    cli.before_fit()
    cli.trainer.fit(cli.model, cli.datamodule)
    assert steps == [2, 4]
