"""Loggers, objectives, modules and data modules of the user."""

import csv

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lrm_pl.cli.fit_config import build_meta_model
from lrm_pl.cli.main import command_line, main
from lrm_pl.inference.export import export
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.version import git_commit
from tests.integration.user_classes import OwnModule, OwnObjective

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


def test_hyperparameters_and_report_metrics_are_logged_to_tensorboard(here, tmp_path):
    line = command_line(["fit", *here, "--run.folder=run", "--model.optimizer.lr=3e-4"])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    logged = {}
    for name, content in events.PluginTagToContent("hparams").items():
        logged[name.rpartition("/")[2]] = HParamsPluginData.FromString(content)
    values = logged["session_start_info"].session_start_info.hparams
    assert values["model.optimizer.lr"].number_value == 3e-4
    assert values["trainer.callbacks.CheckpointAndResume.every"].number_value == 500
    assert values["model.objective.lpips_start_step"].number_value == 0
    assert values["commit"].string_value == git_commit()
    metrics = {info.name.tag for info in logged["experiment"].experiment.metric_infos}
    assert {"val/heldout/psnr_pooled", "report/heldout/psnr_pooled", "report/unseen/lpips"} <= metrics
    (point,) = events.Scalars("report/heldout/psnr_pooled")
    assert point.step == 2
    assert point.value == pytest.approx(line.reports["heldout"].rows["model"].psnr_pooled)
    assert "hp_metric" not in events.Tags()["scalars"]
    assert yaml.safe_load((tmp_path / "run/hparams.yaml").read_text())["model.optimizer.lr"] == 3e-4


def test_hyperparameters_and_report_metrics_are_logged_to_every_logger(here, root, tmp_path):
    loggers = [
        "-c",
        str(root / "configs/logger/csv.yaml"),
        "--trainer.logger+=tests.integration.user_classes.OtherLogger",
    ]
    line = command_line(["fit", *here, *loggers, "--run.folder=run", "--data.batch_size=1"])
    logged = yaml.safe_load((tmp_path / "run/hparams.yaml").read_text())
    assert (logged["data.batch_size"], logged["commit"]) == (1, git_commit())
    assert logged["trainer.logger"] == "CSVLogger, OtherLogger"
    assert line.trainer.loggers[1].params == logged
    rows = list(csv.reader((tmp_path / "run/metrics.csv").read_text().splitlines()))
    last = dict(zip(rows[0], rows[-1], strict=True))
    assert last["step"] == "2"
    found = line.reports["heldout"].rows["model"].psnr_pooled
    assert float(last["report/heldout/psnr_pooled"]) == pytest.approx(found)


def test_custom_objective_module_and_data_module_work_with_every_command(here, tmp_path, capsys):
    own = {
        "model_class": "tests.integration.user_classes.OwnModule",
        "data_class": "tests.integration.user_classes.OwnData",
        "model": {
            "extra": 3,
            "objective": {"class_path": "tests.integration.user_classes.OwnObjective", "init_args": {"weight": 2.0}},
        },
        "data": {"note": "mine"},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    here = [*here, "-c", "own.yaml", "--run.folder=run", "--model.objective.mse=0.5"]
    line = command_line(["fit", *here])
    assert type(line.model) is OwnModule
    assert (line.model.extra, line.model.steps, line.datamodule.note) == (3, 2, "mine")
    assert (line.model.objective.weight, line.model.objective.mse, line.model.objective.lpips) == (2, 0.5, 0)
    assert line.trainer.callback_metrics["loss/planes"] > 0
    again = command_line(["fit", *here, "--trainer.max_steps=4"])
    assert (again.model.steps, again.trainer.global_step) == (2, 4)
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (record["model_class"], record["model"]["extra"]) == (own["model_class"], 3)
    assert type(command_line(["validate", "--ckpt_path=run"]).model) is OwnModule
    assert type(build_meta_model(here)[1].objective) is OwnObjective
    export("run", tmp_path / "model")
    assert LRMPipeline.from_pretrained(str(tmp_path / "model")).step == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model_class=nowhere.Module", r"an importable class for --model_class, but found nowhere.Module \(No"),
        ("--data_class=lightning.LightningDataModule", "a subclass of ShardDataModule for --data_class"),
        ("-c=class.yaml", "model_class: my.MyModule at the top level of the config, and move"),
    ],
)  # fmt: skip
def test_an_invalid_custom_class_is_rejected_with_a_remedy(here, tmp_path, option, message):
    (tmp_path / "class.yaml").write_text("model: {class_path: my.MyModule, init_args: {extra: 3}}\n")
    with pytest.raises(SystemExit, match=message):
        main(["fit", *here, option])
