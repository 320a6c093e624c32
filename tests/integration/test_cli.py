"""The command line on analytic shards."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.apps.convert import main as convert
from lrm_pl.checkpoints.index import read_checkpoint, read_index
from lrm_pl.checkpoints.tensors import read_tensors, tensor_specs
from lrm_pl.cli.main import command_line, main
from lrm_pl.data.order import SampleOrder
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.inference.pipeline import LRMPipeline
from tests.parity.networks import randomized
from tests.parity.openlrm import OpenLRM
from tests.parity.triposr import TripoSR

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


def run_folder(tmp_path, version=0):
    return tmp_path / "runs" / "tiny" / f"version_{version}"


def checkpoint(tmp_path, step, version=0):
    return run_folder(tmp_path, version) / "checkpoints" / f"step-{step:08d}"


def weights(path):
    found = read_checkpoint(str(path))
    into = {name: torch.empty_like(spec, device="cpu") for name, spec in tensor_specs(found).items()}
    read_tensors(found, into)
    return into


def test_a_run_writes_scalars_images_config_commit_and_checkpoint(tiny, tmp_path, capsys):
    main(["fit", *tiny])
    printed = capsys.readouterr().out
    for words in (
        "held-out objects",
        "white image",
        "mean training image",
        "input view repeated",
        "checkpoints/step-00000002",
    ):
        assert words in printed
    assert f"make infer IMAGE=photo.png CKPT={run_folder(tmp_path)}" in printed
    assert f"To show the curves: tensorboard --logdir {tmp_path / 'runs/tiny'}" in printed
    assert "Training: 100%" in printed, "the progress bar counts steps instead of epochs"
    folder = run_folder(tmp_path)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lrm"]["dim"] == 16
    assert (folder / "commit.txt").read_text().strip()
    kept = json.loads((folder / "report.json").read_text())
    assert kept["heldout"]["white image"]["images"] == 2 * 2
    assert f"{kept['unseen']['model']['psnr_pooled']:.2f}" in printed
    for name in ("unseen", "heldout"):
        with Image.open(folder / "views" / f"{name}-step000002.png") as image:
            rows = {"unseen": 4, "heldout": 2}[name]
            assert image.size == (5 * 32, rows * 32), (
                "each row contains input, target, render, opacity and depth"
            )
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    metrics = {
        f"val/{s}/{m}" for s in ("unseen", "heldout") for m in ("psnr", "psnr_pooled", "ssim", "lpips")
    }
    assert metrics <= scalars
    assert {
        "loss/mse",
        "loss/total",
        "optim/grad_norm",
        "optim/lr",
        "optim/skipped_steps",
        "speed/samples_per_second",
        "memory/peak_host_gib",
    } <= scalars
    assert {"views/unseen", "views/heldout"} <= set(events.Tags()["images"])
    # Images, scalars and checkpoints count completed optimizer steps.
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]
    assert [event.step for event in events.Scalars("val/heldout/psnr_pooled")] == [2]
    assert [event.step for event in events.Images("views/heldout")] == [2]
    assert "epoch" not in scalars
    assert any("run/commit" in tag for tag in events.Tags()["tensors"])


@pytest.mark.slow
def test_training_on_ellipsoids_exceeds_a_white_image_by_3_db(tiny):
    cli = command_line([
        "fit", *tiny, "--trainer.max_steps", "80", "--trainer.limit_val_batches", "0", "--data.batch_size", "4",
        "--model.optimizer.lr", "1e-2", "--data.input_pool", "1",
    ])  # fmt: skip
    scores = cli.reports["unseen"].rows
    assert scores["model"].images == 4 * 2
    assert scores["model"].psnr_pooled >= scores["white image"].psnr_pooled + 3


def test_predict_writes_meshes_and_orbits_of_the_held_out_objects(run, capsys, caplog):
    assert set(yaml.safe_load((run / "input.yaml").read_text())) == {
        "distance", "fov_deg", "foreground", "background", "threshold",
    }  # fmt: skip
    main(["predict", "-c", str(run / "config.yaml"), "--ckpt_path", str(run)])
    output = capsys.readouterr().out
    assert f"Meshes, orbits and grids: {run / 'predict'}" in output
    for key in ("val-ellipsoid-000", "val-ellipsoid-001"):
        files = {path.name for path in (run / "predict" / key).iterdir()}
        record = json.loads((run / "predict" / key / "result.json").read_text())
        assert record["object"] == key
        assert files == {*record["files"], "result.json"} >= {"orbit.mp4", "grid.png"}
        assert record["network"]["step"] == 2
        assert record["network"]["sha256"] == LRMPipeline.from_pretrained(run).sha256
        assert bool(record["mesh"]) != bool(record["warnings"])
        # after two steps, an object may have no surface, which is logged
        assert ("mesh.glb" in files) != (f"No mesh was written for {key}" in caplog.text)


def test_validate_and_test_measure_a_checkpoint_and_reject_an_incompatible_one(here, run, tmp_path, capsys):
    files, path = set(tmp_path.iterdir()), str(run / "checkpoints/step-00000002")
    for command, measured in (("validate", str(run)), ("test", path)):
        main([command, "-c", str(run / "config.yaml"), "--ckpt_path", measured])
        printed = capsys.readouterr().out
        assert printed.count("val/heldout/psnr_pooled") == 1, "each metric is printed once"
        assert f"Images and logs: {run / command}" in printed
        assert list((run / command).glob("events*")), "results are written to the run folder"
    assert set(tmp_path.iterdir()) == files, "no new run is created"
    with pytest.raises(
        SystemExit,
        match=r"expected the tensors of this model, but found 25 missing or mismatched tensors.*config\.yaml",
    ):
        main(["validate", *here, "--model.lrm.dim", "32", "--ckpt_path", path])
    with pytest.raises(
        SystemExit, match=r"expected a checkpoint or a run at .*nothing, but found nothing. Correct"
    ):
        main(["validate", *here, "--ckpt_path", str(tmp_path / "nothing")])


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_run(tiny, tmp_path):
    every = ["--trainer.max_steps=4", f"--trainer.callbacks={json.dumps([CHECKPOINTING])}"]
    main(["fit", *tiny, *every])
    main(["fit", *tiny, *every, "--run.resume", str(checkpoint(tmp_path, 2))])
    whole, resumed = weights(checkpoint(tmp_path, 4)), weights(checkpoint(tmp_path, 4, version=1))
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("adam.") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (read_index(str(checkpoint(tmp_path, 4, version))).run for version in (0, 1))
    assert first == second
    assert first["position"] == 4 * 2


CHECKPOINTING = {
    "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
    "init_args": {"every": 2, "keep": 10, "monitor": None},
}


@pytest.mark.parametrize("steps", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_resume_with_a_different_batch_size_continues_with_the_next_sample(
    tiny, tmp_path, monkeypatch, steps
):
    positions = []
    candidates = SampleOrder.candidates
    monkeypatch.setattr(SampleOrder, "candidates", lambda self, g: positions.append(g) or candidates(self, g))
    once = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    main(["fit", *tiny, *once])  # steps of 2 samples
    changed = ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "2"]
    more = ["--trainer.max_steps", str(steps + 2), "--trainer.limit_val_batches", "0"]
    main(["fit", *tiny, *changed, *more, "--run.resume", str(run_folder(tmp_path))])
    assert read_index(str(checkpoint(tmp_path, steps + 2, version=1))).run["position"] == steps * 2 + 2 * 4
    assert positions == list(range(steps * 2 + 2 * 4)), "each sample is read once"


def test_an_unexpected_error_keeps_its_traceback(tiny, monkeypatch):
    def broken(self, stage):
        raise ValueError("unexpected error")

    monkeypatch.setattr("lrm_pl.data.datamodule.ShardDataModule.setup", broken)
    with pytest.raises(ValueError, match="unexpected error"):
        main(["fit", *tiny])


def test_validate_requires_a_checkpoint(tiny):
    with pytest.raises(SystemExit, match="--ckpt_path is not set"):
        main(["validate", *tiny])


def test_the_last_step_is_saved_after_an_earlier_validation(tiny, tmp_path):
    main(["fit", *tiny, "--trainer.max_steps", "3"])  # validation at step 2
    assert read_index(str(checkpoint(tmp_path, 3))).step == 3


def test_training_with_logging_disabled(tiny, tmp_path):
    main(["fit", *tiny, "--trainer.log_every_n_steps=0", "--run.folder", str(tmp_path / "run")])
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "precision",
    [
        "bf16-mixed",
        pytest.param("32-true", marks=pytest.mark.soak),
        pytest.param("16-mixed", marks=pytest.mark.soak),
    ],
)
def test_poses_rays_and_compositing_are_float32_at_every_precision(tiny, monkeypatch, precision):
    from lrm_pl.rendering import ray_marching, renderer

    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def wrapper(*args, **options):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            seen.setdefault(name, set()).update(t.dtype for t in tensors)
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    for module, name in (
        (renderer, "pixel_rays"),
        (renderer, "ray_interval"),
        (ray_marching, "sample_stratified"),
        (ray_marching, "composite"),
    ):
        spy(module, name)
    main(["fit", *tiny, "--trainer.precision", precision, "--trainer.max_steps", "1"])
    assert seen.keys() == {"pixel_rays", "ray_interval", "sample_stratified", "composite"}
    assert set().union(*seen.values()) == {torch.float32}


def test_the_demo_experiment_trains_one_step_with_pretrained_weights(root, tmp_path, shards):
    main([
        "fit", "-c", str(root / "configs/experiment/demo.yaml"), "--data.folder", str(shards),
        "--trainer.max_steps", "1", "--data.batch_size", "2", "--model.objective.lpips_start_step", "0",
        "--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.val_check_interval", "1",
    ])  # fmt: skip
    assert (tmp_path / "lrm" / "version_0" / "checkpoints" / "step-00000001" / "index.json").is_file()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_model_of_the_paper_trains_one_step(root, tmp_path):
    write_synthetic_shards(tmp_path / "shards", train=1, val=0, views=3, resolution=32)
    (tmp_path / "paper.yaml").write_text(f"model: {root / 'configs/model/lrm.yaml'}\n")
    main([
        "fit", "-c", str(tmp_path / "paper.yaml"), "--data.folder", str(tmp_path / "shards"),
        "--trainer.max_steps", "1", "--data.batch_size", "1", "--data.side_views", "1", "--data.unseen_views", "1",
        "--data.crop.low", "16", "--data.crop.high", "32", "--data.crop.size", "16", "--data.workers", "0",
        "--weights.pretrained", "false", "--weights.source", "pypi",
        "--trainer.callbacks", "[]", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "0",
        "--trainer.logger.init_args.save_dir", str(tmp_path),
    ])  # fmt: skip


@pytest.mark.parametrize("source", ["openlrm", pytest.param("triposr", marks=pytest.mark.soak)])
def test_fine_tuning_starts_from_converted_weights_with_a_frozen_encoder(
    source, tmp_path, shards, root, capsys
):
    theirs = {"openlrm": OpenLRM, "triposr": TripoSR}[source]()
    save_file(randomized(theirs, 0).state_dict(), tmp_path / "theirs.safetensors")
    sizes = ["--heads", "4", "--encoder-heads", "3", "--image-size", "112", "--samples-per-ray", "16"]
    convert(["--from", source, str(tmp_path / "theirs.safetensors"), str(tmp_path / "start"), *sizes])
    layers = ["-c", f"{tmp_path}/start/config.yaml", "-c", str(root / "configs/experiment/finetune.yaml")]
    small = ["--data.side_views=1", "--data.unseen_views=2", "--data.workers=0", "--data.batch_size=2"]
    small += ["--data.crop.size=16", "--data.crop.low=16", "--data.crop.high=32", "--model.objective.lpips=0"]
    run = ["--run.folder", str(tmp_path / "run"), "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    start = [
        "--weights.network",
        str(tmp_path / "start"),
        "--weights.source=pypi",
        "--data.folder",
        str(shards),
    ]
    main(["fit", *layers, *small, *run, *start, "--trainer.precision=32-true"])
    assert f"Initialized the network from {tmp_path / 'start'}" in capsys.readouterr().out
    before = load_file(tmp_path / "start" / "model.safetensors")
    after = weights(tmp_path / "run" / "checkpoints" / "step-00000002")
    moved = {name: (after[f"network.{name}"] - tensor).abs().max().item() for name, tensor in before.items()}
    assert all(change == 0 for name, change in moved.items() if name.startswith("encoder."))
    assert all(
        0 < change < 1e-3 for name, change in moved.items() if name.startswith(("decoder.", "upsampler."))
    )
    with pytest.raises(SystemExit, match=r"(?s)found \d+ differences:.*Pass the config of these weights"):
        main(
            [
                "fit",
                *layers,
                *small,
                *run,
                *start,
                "--model.lrm.dim=96",
                "--run.folder",
                str(tmp_path / "other"),
            ]
        )
