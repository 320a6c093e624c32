"""Lightning settings, loggers, signals and saved configs: each works, or is rejected before training."""

import csv
import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.__main__ import main as lrm
from lrm_pl.checkpoints.index import list_checkpoints
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import command_line, main
from lrm_pl.data.manifest import Manifest, write_manifest
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.errors import InputError
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.inference.export import export
from lrm_pl.training.ema import validates_with_average
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.version import git_commit

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator=gpu"], "No supported gpu backend found"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.strategy=nosuch"], "invalid strategy name"),
        (["--trainer.strategy=FSDP2Strategy"], "-c configs/trainer/fsdp2.yaml"),
        (["--trainer.strategy=ddp_spawn"], "start_method popen, but found spawn"),
        (["--trainer.strategy=ddp_notebook"], "found notebook"),
        (
            ["--trainer.strategy=DDPStrategy", "--trainer.strategy.start_method=fork"],
            "found fork",
        ),
        (["--trainer.val_check_interval=0.5"], "steps as trainer.val_check_interval, but found 0.5"),
        (["--trainer.val_check_interval=00:00:00:05"], "steps as trainer.val_check_interval, but found 00:00:00:05"),
        (["--ckpt_path=runs/lrm/version_0"], "to start a new run from a checkpoint"),
        (["--trainer.devices=0"], "not a valid input"),
        (["--trainer.accelerator=cpu", "--trainer.devices=-1"], "should be an int > 0"),
        (
            ["--trainer.callbacks+=lrm_pl.training.checkpointing.CheckpointAndResume", "--trainer.callbacks.every=0"],
            "expected every, keep and keep_every of at least 1, but found every=0",
        ),
        (["--trainer.max_steps=${nosuch.key}"], "in the config: Interpolation key 'nosuch.key'"),
        (["--trainer.max_steps=${oc.env:LRM_NOT_SET}"], "Environment variable 'LRM_NOT_SET' not found"),
        (["--model.class_path=my.Module"], "command line: expected constructor arguments in the section model"),
        (
            ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2"],
            "expected 2 nodes that were started together, but found only this node",
        ),
        (["--trainer.profiler=nosuch"], "profiler"),
        (["--trainer.strategy=null"], "invalid strategy name"),
        (["--seed_everything=-3"], "expected a seed from 0 to 4294967295, but found -3"),
        (["--data.batch_size=-2"], "expected a data.batch_size of at least 1, but found -2"),
        (["--trainer.callbacks+=ModelCheckpoint"], "`ModelCheckpoint` in callbacks list"),
        (
            ["--trainer.callbacks+=lrm_pl.training.ema.WeightAverage"] * 2,
            "expected one WeightAverage in trainer.callbacks, because a checkpoint stores one average, but found 2",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "Early stopping conditioned on metric `val_loss` which is not available",
        ),
        (["--trainer.logger=MLFlowLogger"], "cannot create lightning.pytorch.loggers.MLFlowLogger: "),
        (["--trainer.logger=CometLogger", "--run.folder=run"], "loggers.CometLogger: Requirement"),
    ],
)  # fmt: skip
def test_invalid_settings_are_rejected_with_one_message(here, options, message):
    with pytest.raises(SystemExit) as refused:
        main(["fit", *here, *options])
    output = str(refused.value.code)
    assert output.startswith("lrm: ")
    assert message in output
    assert "\n" not in output


@pytest.mark.parametrize("where", [[], ["--run.folder=run"]])
def test_each_run_has_its_own_folder_with_every_logger(here, tmp_path, where):
    for logger in ("tests.integration.user_classes.OtherLogger", "false"):
        command_line(["fit", *here, f"--trainer.logger={logger}", *where, "--trainer.max_steps=2"])
        if where:
            break
    folders = [tmp_path / "run"] if where else [tmp_path / "runs/lrm" / f"version_{n}" for n in (0, 1)]
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert names >= {"config.yaml", "commit.txt", "input.yaml", "checkpoints", "views", "report.json"}, (
            folder
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny.yaml",
        folders[0].relative_to(tmp_path).parts[0],
    }


def test_runs_are_written_to_default_root_dir_unless_a_logger_sets_a_folder(here, tmp_path):
    root = ["--trainer.default_root_dir=elsewhere", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    for options, folder in (([], "elsewhere/lrm"), (["--trainer.logger.save_dir=mine"], "mine/lrm")):
        line = LRMCLI("fit", [*here, *root, *options], records=False)
        assert line.trainer.log_dir == f"{folder}/version_0"


def test_a_fast_dev_run_writes_no_files(here, tmp_path, capsys):
    command_line(["fit", *here, "--trainer.fast_dev_run=true"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert "no files were kept" in capsys.readouterr().out


def test_the_config_of_a_run_starts_a_new_run(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command_line(["fit", "-c", "run/config.yaml", "--model.optimizer.lr=1e-3"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    new = tmp_path / "runs/lrm/version_0"
    assert len(list_checkpoints(str(new / "checkpoints"))) == 1
    logged = yaml.safe_load((new / "config.yaml").read_text())
    assert (logged["run"]["folder"], logged["model"]["optimizer"]["lr"]) == (None, 1e-3)
    assert next((tmp_path / "runs").rglob("events.out*")).parent == new


def test_the_config_of_the_latest_start_is_saved_and_earlier_versions_are_kept(here, run):
    first = yaml.safe_load((run / "config.yaml").read_text())
    for _ in range(2):
        command_line(["fit", *here, "--run.folder=run", "--trainer.max_steps=4"])
        assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    kept = run / "earlier/until-step-00000002"
    assert [path.name for path in run.glob("earlier/*")] == [kept.name], "only changed files are kept"
    assert yaml.safe_load((kept / "config.yaml").read_text()) == first
    assert not (kept / "commit.txt").exists()


def test_measuring_a_complete_run_on_other_data_does_not_change_its_record(here, run, tmp_path, shards):
    record = {name: (run / name).read_bytes() for name in ("config.yaml", "input.yaml")}
    (tmp_path / "others").symlink_to(shards)
    command_line(["fit", *here, "--run.folder=run", "--data.folder=others", "--model.optimizer.lr=1"])
    assert record == {name: (run / name).read_bytes() for name in record}
    export("run", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert f"| trained on | {shards.name}: " in card
    assert " views | PSNR " not in card, "the report describes other data"


def test_a_complete_run_prints_a_message_and_is_not_truncated(here, run, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        command_line(["fit", *here, "--run.folder=run"])
    assert (
        "is complete (2 steps). To continue the run, increase --trainer.max_steps" in capsys.readouterr().out
    )
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("report/heldout/psnr")] == [2], "logged once"
    assert not [one for one in warned if "CombinedLoader" in str(one.message)]
    with pytest.raises(
        InputError, match=r"of at least 2, the number of completed steps in .*, but found 1. Increase"
    ):
        command_line(
            ["fit", *here, "--run.folder=run", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
        )


def test_the_commit_is_not_read_from_an_enclosing_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(["git", "-C", str(tmp_path), *own], check=True)
    installed = tmp_path / "venv" / "commit.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr("lrm_pl.version.__file__", str(installed))
    assert git_commit() == "unknown"
    subprocess.run(["git", "-C", str(tmp_path), "add", "venv"], check=True)
    assert git_commit() != "unknown", "the code belongs to the repository"


def test_views_that_are_too_small_for_the_metrics_are_rejected_before_training(here, tmp_path):
    manifest = write_synthetic_shards(tmp_path / "small", views=4, resolution=24)
    write_manifest(
        tmp_path / "small", dataclasses.replace(manifest, render=manifest.render | {"resolution": 24})
    )
    with pytest.raises(
        SystemExit, match=r"expected views of at least 31 pixels, which LPIPS .* requires, but found 24"
    ):
        main(["fit", *here, f"--data.folder={tmp_path / 'small'}"])
    with pytest.raises(InputError, match="found 24"):
        PROTOCOLS["lrm"].check_manifest(Manifest((), 15, 0, {"resolution": 24}), "data")


def test_the_report_measures_the_weight_average_if_validation_does(here, tmp_path, capsys):
    average = {
        "class_path": "lrm_pl.training.ema.WeightAverage",
        "init_args": {"decay": 0.9, "validate": True},
    }
    line = command_line(
        [
            "fit",
            *here,
            "--run.folder=run",
            "--model.optimizer.lr=1e-2",
            f"--trainer.callbacks+={json.dumps(average)}",
        ]
    )
    measured = line.trainer.callback_metrics["val/heldout/psnr_pooled"]
    assert line.reports["heldout"].rows["model"].psnr_pooled == pytest.approx(float(measured), abs=1e-4)
    assert "model (average)" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["trainer", "data", "run", "weights", "weights.encoder", "data.crop"])
def test_an_empty_section_is_rejected(here, tmp_path, section):
    outer, _, inner = section.partition(".")
    (tmp_path / "empty.yaml").write_text(f"{outer}:\n  {inner}{':' if inner else '# all'}\n")
    with pytest.raises(
        InputError, match=rf"expected settings in the section {section}, but found an empty section"
    ):
        LRMCLI("fit", [*here, "-c", "empty.yaml"], records=False)


def test_a_single_callback_may_be_given_without_a_list(here):
    line = LRMCLI("fit", [*here, "--trainer.callbacks=LearningRateMonitor"], records=False)
    names = [type(callback).__name__ for callback in line.trainer.callbacks]
    assert {"CheckpointAndResume", "LearningRateMonitor"} <= set(names)
    assert len(line.portable_config.trainer.callbacks) == 1, "the saved config contains a list"


@pytest.mark.parametrize(
    ("name", "averages"), [("lrm_pl.training.ema.WeightAverage", True), ("mine.Checks", False)]
)
def test_only_a_weight_average_callback_selects_the_average_for_validation(tmp_path, name, averages):
    callback = {"class_path": name, "init_args": {"validate": True}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert validates_with_average(tmp_path / "config.yaml") is averages


def test_callbacks_of_lightning_log_correct_learning_rates_and_steps(here, tmp_path, monkeypatch):
    monkeypatch.setattr("lrm_pl.cli.lightning_cli.print_report", lambda *_: {})
    options = [
        "--run.folder=run",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.enable_checkpointing=true",
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.val_check_interval=100",
        "--model.optimizer.warmup=0.5",
    ]
    main(["fit", *here, *options, "--trainer.max_steps=3", "--trainer.log_every_n_steps=2"])
    main(["fit", *here, *options, "--trainer.max_steps=5", "--trainer.log_every_n_steps=1"])
    files = {file.name for file in tmp_path.glob("run/checkpoints/*.ckpt")}
    assert files >= {f"epoch=0-step={step}.ckpt" for step in range(1, 6)}
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    rates = {
        int(row["step"]): float(row[name])
        for row in rows
        for name in row
        if name.startswith("lr-") and row[name]
    }
    schedule = OptimizerConfig(warmup=0.5)
    assert rates[1] == pytest.approx(schedule.learning_rate(0, 3))
    assert rates[3] == pytest.approx(schedule.learning_rate(3, 5)), (
        "the learning rate of the first step after resuming"
    )
    assert rates[4] == pytest.approx(schedule.learning_rate(3, 5))


def test_validate_reads_the_config_of_the_run_by_default(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lrm", "validate", "--ckpt_path", "run"])
    lrm()
    events = EventAccumulator(str(run / "validate")).Reload()
    assert [event.step for event in events.Scalars("val/heldout/psnr_pooled")] == [2], (
        "the step of the checkpoint"
    )
    assert [event.step for event in events.Images("views/heldout")] == [2]
    assert (run / "validate/views/heldout-step000002.png").is_file()


def test_a_missing_checkpoint_is_reported_before_missing_data():
    with pytest.raises(SystemExit, match="expected a checkpoint or a run at runs/nosuch, but found nothing"):
        main(["validate", "--ckpt_path", "runs/nosuch"])


def test_the_seed_of_the_command_line_determines_the_order_of_samples(here):
    def positions(*options):
        data = LRMCLI("fit", [*here, "--trainer.callbacks=[]", *options], records=False).datamodule
        return data.seed

    assert positions("--seed_everything=5") == 5
    assert positions("--seed_everything=5", "--data.seed=3") == 3
