"""The command line, in process, on analytic shards: what a user types, and what it must answer."""

import dataclasses
import io
import json
import re
import shutil

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl import checkpoints as ck
from lrm_pl.__main__ import main as lrm
from lrm_pl.apps.convert import main as convert
from lrm_pl.checkpoints import read_index
from lrm_pl.cli.fit_config import parse_fit
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import command_line, main
from lrm_pl.data.manifest import Manifest, write_manifest
from lrm_pl.data.order import SampleOrder
from lrm_pl.data.schema import encode_sample
from lrm_pl.data.synthetic import synthetic_sample, write_synthetic_shards
from lrm_pl.data.tar import write_shard
from lrm_pl.errors import InputError
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.training.checkpointing import CheckpointAndResume
from tests.builders import TINY
from tests.parity.networks import randomized
from tests.parity.openlrm import OpenLRM
from tests.parity.triposr import TripoSR

# Lightning warns of small things (few workers, short runs) that are so by design here.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def tiny(tmp_path, shards):
    """Arguments of a tiny run, logging below tmp_path."""
    path = tmp_path / "tiny.yaml"
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path / "runs"), "name": "tiny"},
    }
    trainer = {
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "logger": logger,
        "precision": "32-true",
    }
    path.write_text(yaml.safe_dump({**TINY, "trainer": trainer}))
    return ["-c", str(path), "--data.folder", str(shards)]


def run_folder(tmp_path, version=0):
    return tmp_path / "runs" / "tiny" / f"version_{version}"


def checkpoint(tmp_path, step, version=0):
    return run_folder(tmp_path, version) / "checkpoints" / f"step-{step:08d}"


def weights(path):
    found = ck.read_checkpoint(str(path))
    into = {name: torch.empty_like(spec, device="cpu") for name, spec in ck.tensor_specs(found).items()}
    ck.read_tensors(found, into)
    return into


def test_a_run_leaves_scalars_images_config_commit_and_checkpoint(tiny, tmp_path, capsys):
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
    assert f"Watch the run: tensorboard --logdir {tmp_path / 'runs/tiny'}" in printed, (
        "make looks into ./runs"
    )
    assert "Training: 100%" in printed, "the bar counts steps; there are no epochs"
    folder = run_folder(tmp_path)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lrm"]["dim"] == 16
    assert (folder / "commit.txt").read_text().strip()
    kept = json.loads((folder / "report.json").read_text())
    assert kept["heldout"]["white image"]["images"] == 2 * 2
    assert f"{kept['unseen']['model']['psnr_pooled']:.2f}" in printed
    for name in ("unseen", "heldout"):
        with Image.open(folder / "views" / f"{name}-step000002.png") as image:
            rows = {"unseen": 4, "heldout": 2}[name]
            assert image.size == (5 * 32, rows * 32), "input | target | render | opacity | depth, whole views"
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
    # Images, scalars and checkpoints count the same: optimizer steps that are done.
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]
    assert [event.step for event in events.Scalars("val/heldout/psnr_pooled")] == [2]
    assert [event.step for event in events.Images("views/heldout")] == [2]
    assert "epoch" not in scalars
    assert any("run/commit" in tag for tag in events.Tags()["tensors"])


@pytest.mark.slow
def test_a_few_dozen_steps_on_ellipsoids_already_beat_a_white_image_by_3_db(tiny):
    cli = command_line([
        "fit", *tiny, "--trainer.max_steps", "80", "--trainer.limit_val_batches", "0", "--data.batch_size", "4",
        "--model.optimizer.lr", "1e-2", "--data.input_pool", "1",
    ])  # fmt: skip
    scores = cli.reports["unseen"].rows
    assert scores["model"].images == 4 * 2
    assert scores["model"].psnr_pooled >= scores["white image"].psnr_pooled + 3


def test_predict_writes_meshes_and_orbits_of_the_held_out_objects(tiny, tmp_path, capsys):
    folder = tmp_path / "kept"
    main(["fit", *tiny, "--run.folder", str(folder)])
    assert set(yaml.safe_load((folder / "input.yaml").read_text())) == {
        "distance", "fov_deg", "foreground", "background", "threshold",
    }  # fmt: skip
    main(["predict", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder)])
    said = capsys.readouterr().out
    assert f"Meshes, orbits and grids: {folder / 'predict'}" in said
    for key in ("val-ellipsoid-000", "val-ellipsoid-001"):
        files = {path.name for path in (folder / "predict" / key).iterdir()}
        record = json.loads((folder / "predict" / key / "result.json").read_text())
        assert record["object"] == key
        assert files == {*record["files"], "result.json"} >= {"orbit.mp4", "grid.png"}
        assert record["network"]["step"] == 2
        assert record["network"]["sha256"] == LRMPipeline.from_pretrained(folder).sha256
        assert bool(record["mesh"]) != bool(record["warnings"])
        # two steps of training may leave nothing opaque: then it says so
        assert ("mesh.glb" in files) != (f"No mesh of {key}" in said)


def test_validate_and_test_measure_a_checkpoint_and_a_wrong_one_is_refused(tiny, tmp_path, capsys):
    main(["fit", *tiny])
    capsys.readouterr()
    run = run_folder(tmp_path)
    for command in (
        "validate",
        "test",
    ):  # from the run's own record, as the help says; the run's folder will do
        for path in (run, checkpoint(tmp_path, 2)):
            main([command, "-c", str(run / "config.yaml"), "--ckpt_path", str(path)])
            printed = capsys.readouterr().out
            assert printed.count("val/heldout/psnr_pooled") == 1, "each number is said once"
            assert f"Images and logs: {run / command}" in printed
        assert list((run / command).glob("events*")), "what is found lies below the run"
    assert sorted(path.name for path in run.parent.iterdir()) == [run.name], "no new run is made"
    path = str(checkpoint(tmp_path, 2))
    with pytest.raises(
        SystemExit, match=r"expected the weights of this model; missing or of another shape.*config\.yaml"
    ):
        main(["validate", *tiny, "--model.lrm.dim", "32", "--ckpt_path", path])
    with pytest.raises(
        SystemExit, match=r"expected a checkpoint or a run at .*nothing, but found nothing. Correct"
    ):
        main(["validate", *tiny, "--ckpt_path", str(tmp_path / "nothing")])


def test_a_resumed_run_ends_in_the_same_bits_as_an_uninterrupted_one(tiny, tmp_path):
    every = ["--trainer.max_steps=4", f"--trainer.callbacks={json.dumps([KEEPER])}"]
    main(["fit", *tiny, *every])
    main(["fit", *tiny, *every, "--run.resume", str(checkpoint(tmp_path, 2))])
    whole, resumed = weights(checkpoint(tmp_path, 4)), weights(checkpoint(tmp_path, 4, version=1))
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("adam.") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (read_index(str(checkpoint(tmp_path, 4, version))).run for version in (0, 1))
    assert first == second
    assert first["position"] == 4 * 2


KEEPER = {
    "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
    "init_args": {"every": 2, "keep": 10, "monitor": None},
}


@pytest.mark.parametrize("steps", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_a_run_resumed_with_another_batch_size_and_accumulation_reads_on_where_it_was(
    tiny, tmp_path, monkeypatch, steps
):
    asked = []
    candidates = SampleOrder.candidates
    monkeypatch.setattr(SampleOrder, "candidates", lambda self, g: asked.append(g) or candidates(self, g))
    once = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    main(["fit", *tiny, *once])  # steps of 2 samples
    changed = ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "2"]
    more = ["--trainer.max_steps", str(steps + 2), "--trainer.limit_val_batches", "0"]
    main(["fit", *tiny, *changed, *more, "--run.resume", str(run_folder(tmp_path))])
    assert read_index(str(checkpoint(tmp_path, steps + 2, version=1))).run["position"] == steps * 2 + 2 * 4
    assert asked == list(range(steps * 2 + 2 * 4)), "every sample once, none twice"


def test_a_mistake_of_our_own_keeps_its_traceback(tiny, monkeypatch):
    def broken(self, stage):
        raise ValueError("not the user's doing")

    monkeypatch.setattr("lrm_pl.data.datamodule.ShardDataModule.setup", broken)
    with pytest.raises(ValueError, match="not the user's doing"):
        main(["fit", *tiny])


def test_measuring_without_a_checkpoint_is_refused(tiny):
    with pytest.raises(SystemExit, match="--ckpt_path is not set"):
        main(["validate", *tiny])


def test_processes_that_do_not_divide_the_batch_are_refused_before_the_first_step(tiny):
    with pytest.raises(
        SystemExit, match=r"3 processes x 1 accumulated batches divide, but found 2; .* take 3, or"
    ):
        main(["fit", *tiny, "--trainer.accelerator", "cpu", "--trainer.devices", "3"])
    with pytest.raises(SystemExit, match=r"1 processes x 4 accumulated batches divide, but found 2"):
        main(["fit", *tiny, "--trainer.accumulate_grad_batches", "4"])


def test_fewer_samples_than_a_step_takes_are_refused_before_the_first_step(tiny):
    with pytest.raises(SystemExit, match=r"expected at least 6 samples .* found 4; .* --data.batch_size 4"):
        main(["fit", *tiny, "--data.batch_size", "6"])


def test_the_last_step_is_kept_whenever_validation_was(tiny, tmp_path):
    main(["fit", *tiny, "--trainer.max_steps", "3"])  # validation at step 2
    assert read_index(str(checkpoint(tmp_path, 3))).step == 3


def test_cube_normalised_shards_are_not_cut_to_the_sphere_in_silence(tiny, tmp_path, shards):
    cube = tmp_path / "cube"
    shutil.copytree(shards, cube)
    manifest = cube / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sphere"', '"cube"'))
    with pytest.raises(SystemExit, match=r"found 'cube'.*--model\.renderer\.bounds box"):
        main(["fit", *tiny, "--data.folder", str(cube)])


@pytest.mark.parametrize(
    ("section", "key"), [("model.objective", "lpipz"), ("model.objective", "lpip"), ("model.lrm", "dept")]
)
def test_a_misspelt_or_shortened_key_is_refused_by_name(tiny, capsys, section, key):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *tiny, f"--{section}.{key}", "1"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert section in said
    assert key in said


def test_a_misspelt_key_in_a_config_file_is_refused_by_name(tiny, tmp_path, capsys):
    for text, key in (("data: {bach_size: 4}", "bach_size"), ("model: {objective: {lpipz: 1}}", "lpipz")):
        (tmp_path / "typo.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main(["fit", *tiny, "-c", str(tmp_path / "typo.yaml")])
        assert key in capsys.readouterr().err


@pytest.mark.parametrize("where", ["config", "section"])
def test_a_key_that_stands_twice_in_a_config_is_refused_with_its_lines(tiny, tmp_path, where):
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


def test_a_run_that_logs_no_step_trains(tiny, tmp_path):
    main(["fit", *tiny, "--trainer.log_every_n_steps=0", "--run.folder", str(tmp_path / "run")])
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_crops_too_small_for_the_perceptual_loss_are_refused_before_training(tiny):
    small = ("--data.crop.size=8", "--data.crop.low=8", "--data.crop.high=16", "--model.objective.lpips=1")
    with pytest.raises(SystemExit, match="expected crops of at least 16 pixels for LPIPS, but found 8"):
        main(["fit", *tiny, *small])


def test_an_unknown_command_is_refused_and_help_names_what_there_is(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lrm", "predikt"])
    with pytest.raises(SystemExit):
        lrm()
    assert "expected one of fit, validate, test, predict" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["lrm", "--help"])
    with pytest.raises(SystemExit):
        lrm()
    assert "lrm fit -c configs/experiment/demo.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    "precision",
    [
        "bf16-mixed",
        pytest.param("32-true", marks=pytest.mark.soak),
        pytest.param("16-mixed", marks=pytest.mark.soak),
    ],
)
def test_poses_rays_t_and_compositing_are_float32_whatever_the_precision(tiny, monkeypatch, precision):
    from lrm_pl.rendering import ray_marching, volume

    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def wrapper(*args, **options):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            seen.setdefault(name, set()).update(t.dtype for t in tensors)
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    for module, name in (
        (volume, "pixel_rays"),
        (volume, "ray_interval"),
        (ray_marching, "stratified"),
        (ray_marching, "composite"),
    ):
        spy(module, name)
    main(["fit", *tiny, "--trainer.precision", precision, "--trainer.max_steps", "1"])
    assert seen.keys() == {"pixel_rays", "ray_interval", "stratified", "composite"}
    assert set().union(*seen.values()) == {torch.float32}


def test_missing_shards_and_a_truncated_shard_stop_before_training_with_the_remedy(tiny, tmp_path, shards):
    with pytest.raises(SystemExit, match=r"expected finished shards in .*nowhere.*make render-shards OUT="):
        main(["fit", *tiny, "--data.folder", str(tmp_path / "nowhere")])
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = broken / "train-000001.tar"
    size = tar.stat().st_size
    with open(tar, "r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        SystemExit, match=f"expected {size} bytes, but found {size - 1000}: the checkpoint is damaged"
    ):
        main(["fit", *tiny, "--data.folder", str(broken)])
    tar.unlink()
    with pytest.raises(SystemExit, match=r"expected the shard file .*train-000001\.tar, but found none"):
        main(["fit", *tiny, "--data.folder", str(broken)])


def _break_poses(content):
    place = content.index(b"\x93NUMPY")
    content[place : place + 6] = b"corrup"


def _break_images(content):
    for place in (m.start() for m in re.finditer(rb"WEBPVP8L", bytes(content))):
        content[place + 12] = 0  # what lossless pixels begin with


def test_a_view_that_is_not_rgba_is_named_and_its_sample_skipped(tiny, tmp_path, caplog):
    good = [synthetic_sample(f"good-{i}", views=8, resolution=32, seed=0) for i in range(2)]
    opaque = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(opaque, "PNG")
    bad = dataclasses.replace(synthetic_sample("opaque", 8, 32, seed=0), views=(opaque.getvalue(),) * 8)
    folder = tmp_path / "rgb"
    folder.mkdir()
    samples = [(sample.info.id, encode_sample(sample)) for sample in (*good, bad)]
    shard = write_shard(folder, "train-000000.tar", "train", samples)
    write_manifest(folder, Manifest((shard,), 8, 0, {"renderer": "synthetic", "normalize": "sphere"}))
    caplog.set_level("WARNING")
    main(["fit", *tiny, "--data.folder", str(folder), "--trainer.limit_val_batches", "0"])
    message = r"Skipped .*train-000000\.tar.*'opaque'.*expected RGBA views, but found mode RGB"
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("damage", [_break_poses, _break_images])
def test_a_corrupt_sample_is_named_and_skipped_and_training_goes_on(tiny, tmp_path, shards, caplog, damage):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = broken / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    damage(content)
    tar.write_bytes(bytes(content))
    caplog.set_level("WARNING")
    main(["fit", *tiny, "--data.folder", str(broken), "--trainer.limit_val_batches", "0"])
    assert "train-000000.tar" in caplog.text
    assert "train-ellipsoid-000" in caplog.text


def test_more_views_than_the_shards_have_are_refused_with_the_command_to_type(tiny):
    with pytest.raises(
        SystemExit, match=r"expected at least 12 views an object.*found 8.*make render-shards VIEWS=12"
    ):
        main(["fit", *tiny, "--data.side_views", "9"])


def test_the_demo_experiment_takes_one_step_with_its_real_weights(root, tmp_path, shards):
    main([
        "fit", "-c", str(root / "configs/experiment/demo.yaml"), "--data.folder", str(shards),
        "--trainer.max_steps", "1", "--data.batch_size", "2", "--model.objective.lpips_start_step", "0",
        "--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.val_check_interval", "1",
    ])  # fmt: skip
    assert (tmp_path / "lrm" / "version_0" / "checkpoints" / "step-00000001" / "index.json").is_file()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_papers_size_takes_one_step(root, tmp_path):
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
def test_fine_tuning_starts_from_converted_weights_keeps_the_encoder_and_trains_the_rest(
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
    with pytest.raises(SystemExit, match=r"found \d+ differences: .*build the network of its own config"):
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


def test_a_network_of_two_input_views_is_given_two_and_their_number_is_no_setting_of_the_data(tiny, tmp_path):
    seen = []

    def note(_, inputs):
        seen.append(tuple(inputs[0].shape))

    cli = LRMCLI(
        "fit", [*tiny, "--model.lrm.input_views", "2", "--run.folder", str(tmp_path / "run")], records=False
    )
    cli.before_fit()
    cli.model.lrm.register_forward_pre_hook(note)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert {shape[1] for shape in seen} == {2}
    with pytest.raises(SystemExit):
        main(["fit", *tiny, "--data.inputs", "3"])


def test_a_mixture_of_sets_is_trained_on_and_measured(tiny, tmp_path, shards, capsys):
    other = tmp_path / "other"
    write_synthetic_shards(other, train=3, val=1, views=6, resolution=32)
    main(["fit", *tiny, f"--data.also=[{{folder: {other}, weight: 3}}]"])
    assert "unseen views of the training objects: 14 images of 7 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["'${trainer.max_steps}'", pytest.param("'${oc.env:LRM_TEST_STEPS}'", marks=pytest.mark.soak)]
)
def test_what_a_config_interpolates_is_resolved_by_every_command(tiny, tmp_path, monkeypatch, value):
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


def test_callbacks_of_a_config_are_added_to_those_that_keep_the_run(tiny, tmp_path):
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


def test_one_of_those_callbacks_is_replaced_by_the_configs_own(tiny, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: lrm_pl.training.checkpointing.CheckpointAndResume\n    init_args: {every: 7}\n"
    )
    cli = LRMCLI("fit", [*tiny, "-c", str(tmp_path / "own.yaml")], records=False)
    (keeper,) = [c for c in cli.trainer.callbacks if isinstance(c, CheckpointAndResume)]
    assert keeper.every == 7


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
def test_there_is_one_run_keeper_however_its_settings_are_given(tiny, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "added.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "  - class_path: lrm_pl.training.checkpointing.CheckpointAndResume\n    init_args: {every: 7}\n"
        "  - lrm_pl.training.ema.WeightAverage\n"
    )
    cli = LRMCLI("fit", [*tiny, *options], records=False)
    assert [c.every for c in cli.trainer.callbacks if isinstance(c, CheckpointAndResume)] == [7]
    assert len(cli.trainer.callbacks) == 7 + ("-c" in options)


def test_lightnings_timer_is_taken_and_kept_in_the_record(tiny, tmp_path):
    limit = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    main(["fit", *tiny, *limit, "--run.folder", str(tmp_path / "run")])
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    timer = record["trainer"]["callbacks"][-1]
    assert timer["class_path"] == "lightning.pytorch.callbacks.Timer"
    assert timer["init_args"]["interval"] == "step"


def _fields(section, above=()):
    for name, value in section.items():
        yield from _fields(value, (*above, name)) if isinstance(value, dict) else [(*above, name)]


def test_a_preset_of_the_model_takes_the_place_of_another_whole(root):
    presets = {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((root / "configs/model").glob("*.yaml"))
    }
    every = {field for preset in presets.values() for field in _fields(preset)}
    left = {(name, *field) for name, preset in presets.items() for field in every - set(_fields(preset))}
    assert not left, "what a preset does not say would be the other's"
    preset = f"--model={root / 'configs/model/openlrm_small.yaml'}"
    demo = parse_fit(["-c", str(root / "configs/experiment/demo.yaml"), preset])["model"]
    assert demo == parse_fit([preset])["model"]


@pytest.mark.parametrize("option", ["--optimizer=SGD", "--lr_scheduler=CosineAnnealingLR"])
def test_an_optimizer_that_would_not_be_used_is_not_offered(tiny, option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *tiny, option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_validation_is_after_so_many_optimizer_steps_however_batches_are_accumulated(tiny, tmp_path):
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
