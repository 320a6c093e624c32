"""End-to-end tests of `lrm evaluate`: results, resuming, several processes and comparisons."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.apps.evaluate import main
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.evaluation import run as run_file
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.features import load_inception
from lrm_pl.evaluation.objects import PerceptualMetrics
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.evaluation.run import evaluate, track_progress
from lrm_pl.evaluation.surfaces import rotation_grid
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.weights.catalog import DownloadError
from lrm_pl.weights.encoders import pretrained_perceptual_loss
from tests.builders import tiny_pretrained

# TensorBoard's writer, and torch's loader of its own files, warn of what they will change.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module", autouse=True)
def cached_lpips():
    """Load each LPIPS network only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_file, "pretrained_perceptual_loss", functools.cache(pretrained_perceptual_loss))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "shards"
    write_synthetic_shards(folder, train=2, val=2, views=16, resolution=32, surface=True)
    return folder


def run(pretrained, data, out, *options):
    main(["--ckpt", str(pretrained), "--data", str(data), "--out", str(out), "--device", "cpu", *options])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(pretrained, data, tmp_path_factory):
    """Folder of an evaluation under the protocol "lrm" with baselines."""
    out = tmp_path_factory.mktemp("finished") / "lrm"
    run(pretrained, data, out, "--baseline")
    return out


def test_results_contain_metrics_tables_images_and_tensorboard_events(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["objects"] == 2
    assert results["protocol"]["name"] == "lrm"
    assert len(results["settings"]["network"]["sha256"]) == 64
    assert results["versions"]["commit"]
    rows = results["mean"]
    assert set(rows) == {"model", "white image", "input view repeated", "mean training image"}
    for row in rows.values():
        assert set(row) == {"psnr", "ssim", "lpips_alex", "lpips_vgg"}
        assert 3 < row["psnr"] < 40
    table = (finished / "results.md").read_text()
    assert "| prediction | psnr ↑ | ssim ↑ | lpips_alex ↓ | lpips_vgg ↓ |" in table
    assert f"| model | {rows['model']['psnr']:.2f} |" in table
    page = (finished / "index.html").read_text()
    for word in (
        "Worst objects",
        "Best objects",
        "val-ellipsoid-000",
        "data:image/png;base64",
    ):
        assert word in page
    board = EventAccumulator(str(finished / "board"))
    board.Reload()
    assert board.Scalars("lrm/psnr/model")[0].value == pytest.approx(rows["model"]["psnr"], rel=1e-6)
    tags = board.Tags()
    orbits = {f"lrm/orbit/val-ellipsoid-00{k}" for k in range(2)}
    assert {"lrm/worst", "lrm/best"} | orbits <= set(tags["images"])
    orbit = Image.open(io.BytesIO(board.Images("lrm/orbit/val-ellipsoid-000")[0].encoded_image_string))
    assert (orbit.format, orbit.n_frames) == ("GIF", 24)
    assert {f"lrm/mesh/val-ellipsoid-000_{part}" for part in ("VERTEX", "FACE", "COLOR")} <= set(
        tags["tensors"]
    )
    assert "evaluation/lrm/text_summary" in tags["tensors"]


def test_a_resumed_evaluation_evaluates_only_missing_objects_with_the_same_results(
    finished, pretrained, data, tmp_path, capsys
):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    (out / "objects" / "val-ellipsoid-001.json").unlink()
    (out / "results.json").unlink()
    kept = (out / "objects" / "val-ellipsoid-000.json").stat().st_mtime_ns
    shutil.copytree(pretrained, tmp_path / "moved")
    run(tmp_path / "moved", data, out, "--baseline")
    assert "Already evaluated: 1 object\n" in capsys.readouterr().out
    assert (out / "objects" / "val-ellipsoid-000.json").stat().st_mtime_ns == kept
    for name in ("results.json", "results.md", "index.html", "objects/val-ellipsoid-001.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(
        SystemExit,
        match=r"expected baselines False, but found True in the folder. Pass --baseline, or choose",
    ):
        run(pretrained, data, out)


def test_a_finished_evaluation_prints_its_results_without_loading_lpips(
    finished, pretrained, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr("lrm_pl.evaluation.run.pretrained_perceptual_loss", None)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(pretrained, data, out, "--baseline")
    said = capsys.readouterr().out
    assert f"All objects have already been evaluated. To evaluate them again, delete {out}" in said
    assert "2 of 2 objects" in said
    assert "| model |" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    (out / "objects" / "val-ellipsoid-000.json").unlink()
    with pytest.raises(TypeError):  # the evaluation is not finished, so LPIPS is loaded
        run(pretrained, data, out, "--baseline")


def test_baselines_are_added_without_evaluating_the_model_again(
    finished, pretrained, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "plain"
    plain = run(pretrained, data, out)
    assert set(plain["mean"]) == {"model"}
    monkeypatch.setattr("lrm_pl.evaluation.run.measure_object", None)
    joined = run(pretrained, data, out, "--baseline")
    assert joined["settings"]["baselines"] is True
    for name in ("results.json", "results.md", "index.html", "objects/val-ellipsoid-000.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    assert "Already evaluated:" not in capsys.readouterr().out.split("Page:")[1]


def test_progress_is_printed_without_a_terminal(monkeypatch):
    told = io.StringIO()
    console = Console(file=told, force_terminal=False)
    monkeypatch.setattr("lrm_pl.evaluation.run._PROGRESS_S", 0.0)
    assert list(track_progress("abc", "Evaluating, lrm", console)) == ["a", "b", "c"]
    assert told.getvalue().splitlines() == [f"Evaluating, lrm: {k} of 3" for k in (1, 2, 3)]


def test_a_comparison_does_not_import_torch_or_overwrite_another_comparison(finished, tmp_path, root):
    """Compare in a new process that prints whether torch was imported."""
    (tmp_path / "a").symlink_to(finished)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").symlink_to(finished)
    program = "import sys\nfrom lrm_pl.apps.evaluate import main\ntry: main()\n" \
        "finally: print('torch' in sys.modules)"  # fmt: skip

    def compare(*words):
        command = [sys.executable, "-c", program, "evaluate", "--compare", *words]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )

    for _ in range(2):
        done = compare("a", "other/a")
        assert done.returncode == 0, done.stderr
        assert "Page: evaluation/a-a/comparison.html" in done.stdout
        assert done.stdout.splitlines()[-1] == "False"
    table = tmp_path / "evaluation" / "a-a" / "comparison.md"
    table.write_text("another comparison")
    done = compare("a", "other/a")
    assert done.returncode == 1
    assert (
        "expected no other comparison in evaluation/a-a, but found one. Pass another folder with --out"
        in done.stderr
    )
    assert table.read_text() == "another comparison"
    assert compare("a", "other/a", "--out", "evaluation/a-a").returncode == 0


def test_missing_files_are_evaluated_again_and_damaged_files_are_rejected(
    finished, pretrained, data, tmp_path, capsys
):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    mesh = out / "shown" / "val-ellipsoid-001.npz"
    mesh.write_bytes(mesh.read_bytes()[:500])
    (out / "results.json").unlink()  # files of a finished evaluation are not read again
    with pytest.raises(
        SystemExit, match=r"val-ellipsoid-001\.npz: expected an .npz file, but found .*run the command again"
    ):
        run(pretrained, data, out, "--baseline")
    mesh.unlink()
    (out / "objects" / "val-ellipsoid-000.png").unlink()
    capsys.readouterr()
    run(pretrained, data, out, "--baseline")
    assert "Already evaluated:" not in capsys.readouterr().out
    for name in ("objects/val-ellipsoid-000.png", "index.html", "results.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert mesh.is_file()


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ("2", "expected a run, a checkpoint .*, but found nothing at nope"),
        ("0", "expected --processes of at least 1, but found 0"),
    ],
)
def test_errors_are_reported_once_before_processes_start(processes, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^lrm: {message}"):
        main(["--ckpt", "nope", "--data", str(data), "--processes", processes])


def test_two_processes_have_the_results_of_one_process(finished, pretrained, data, tmp_path, root):
    out = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lrm_pl",
    ]
    command += [
        "evaluate",
        "--ckpt",
        pretrained,
        "--data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        "--baseline",
    ]
    done = subprocess.run(
        [str(part) for part in command], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (out, finished))
    for row, metrics in expected["mean"].items():  # the number of threads changes the order of sums
        assert found["mean"][row] == pytest.approx(metrics, rel=1e-4), row
    assert found["objects"] == 2
    assert done.stdout.count("2 of 2 objects") == 1, "only rank 0 prints"


@pytest.mark.parametrize("name", ["geometry", pytest.param("geometry-posed", marks=pytest.mark.soak)])
def test_geometry_protocols_compare_the_mesh_with_the_true_surface(
    name, pretrained, data, tmp_path, monkeypatch
):
    # a coarse grid of rotations saves time
    monkeypatch.setattr("lrm_pl.evaluation.surfaces._STEPS", (4, 4, 2))
    rotation_grid.cache_clear()
    results = run(pretrained, data, tmp_path / name, "--protocol", name, "--limit", "1")
    rotation_grid.cache_clear()
    row = results["mean"]["model"]
    assert set(row) == {"chamfer", "f_score@0.1", "f_score@0.2", "f_score@0.5", "normal_consistency"}
    assert 0 < row["chamfer"] < 1
    assert row["f_score@0.1"] <= row["f_score@0.2"] <= row["f_score@0.5"]


def test_shards_that_a_protocol_cannot_use_are_rejected_with_a_remedy(pretrained, shards, data, tmp_path):
    for arguments, message in (
        ((shards, "--protocol", "lrm"), "at least 15 views per object for the protocol 'lrm', but found 8"),
        ((data, "--protocol", "gso-orbit"), "at least 24 views"),
        ((data, "--ids", "chair*"), "objects of the split 'val' with ids that match 'chair"),
        ((data, "--limit", "0"), "expected a limit of at least one object, but found 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(pretrained, arguments[0], tmp_path / "out", *arguments[1:])
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SystemExit, match=r"expected a writable folder .*file, but found .*Choose another folder"
    ):
        run(pretrained, data, tmp_path / "file")
    plain = tmp_path / "plain"
    write_synthetic_shards(plain, train=1, val=1, views=16, resolution=32)
    with pytest.raises(
        SystemExit,
        match=r"expected surface points \(surface\.npy\), but found none. Render the shards with ARGS",
    ):
        run(pretrained, plain, tmp_path / "out2", "--protocol", "geometry")


def test_two_models_are_compared_by_paired_differences(finished, data, tmp_path, capsys):
    other = tiny_pretrained()
    with torch.no_grad():
        other.network.decoder.layers[-1].bias[0] -= 5  # renderings are almost white
    other.save_pretrained(tmp_path / "other")
    run(tmp_path / "other", data, tmp_path / "b", "--baseline")
    main(["--compare", str(finished), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    said = capsys.readouterr().out
    a, b = (
        json.loads((folder / "results.json").read_text())["mean"]["model"]
        for folder in (finished, tmp_path / "b")
    )
    assert f"| psnr | {b['psnr'] - a['psnr']:+.4f} |" in said
    assert "| 2 |" in said
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert "95 % confidence interval" in page
    assert page.count("data:image/png;base64") == 4
    with pytest.raises(SystemExit, match="expected a finished evaluation in"):
        main(["--compare", str(finished), str(tmp_path / "nothing")])
    (tmp_path / "b" / "objects" / "val-ellipsoid-000.json").unlink()
    with pytest.raises(SystemExit, match=r"expected 2 evaluated objects, but found 1. Run the same"):
        main(["--compare", str(finished), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    (tmp_path / "b" / "settings.json").write_text('{"protocol": {"name": "lrm"}}')
    with pytest.raises(SystemExit, match="expected the settings of an evaluation, but found KeyError"):
        main(["--compare", str(finished), str(tmp_path / "b"), "--out", str(tmp_path / "c")])


def test_a_damaged_object_is_reported_and_the_other_objects_are_evaluated(pretrained, data, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    index = json.loads((copy / "val-000000.index.json").read_text())
    offset, size = index["val-ellipsoid-000"]["view_003.webp"]
    content = bytearray((copy / "val-000000.tar").read_bytes())
    content[offset : offset + size] = bytes(size)
    (copy / "val-000000.tar").write_bytes(content)
    results = run(pretrained, copy, tmp_path / "out", "--protocol", "lrm")
    assert results["objects"] == 1
    assert "expected a PNG or WebP view" in results["failed"]["val-ellipsoid-000"]
    assert "val-ellipsoid-000: " in capsys.readouterr().out


def test_fid_kid_and_clip_similarity_use_the_given_networks(pretrained, data, tmp_path):
    def pooled(images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    trained, objects = LRMPipeline.from_pretrained(pretrained), EvaluationDataset(str(data), "val", limit=1)
    settings = {
        "protocol": {"name": "lrm"},
        "network": {"source": "x", "step": None, "sha256": "0" * 64},
        "data": {"folder": "d", "split": "val", "ids": "*"},
    }
    perceptual = PerceptualMetrics({}, clip=pooled, features=pooled)
    results = evaluate(trained, PROTOCOLS["lrm"], objects, tmp_path, perceptual, {}, settings)
    row = results["mean"]["model"]
    assert set(row) == {"psnr", "ssim", "clip", "fid", "kid"}
    with np.load(tmp_path / "objects" / "val-ellipsoid-000.npz") as features:
        assert features["model"].shape == (75, 12)
        assert features["target"].shape == (15, 12)
    assert row["fid"] > 0.01


def test_missing_weights_of_inception_and_clip_are_rejected_with_a_remedy(
    pretrained, data, tmp_path, monkeypatch
):
    def fail(*_):
        raise DownloadError("no network here")

    monkeypatch.setattr("lrm_pl.weights.resolve.download", fail)
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"(?s)were not found .*Set the path of the file: --inception FILE"):
        load_inception(None, None, torch.device("cpu"))
    monkeypatch.delenv("LRM_CACHE")
    with pytest.raises(
        SystemExit, match=r"vit_base_patch32_clip.*: expected a file at .*none.pth, but found none"
    ):
        run(pretrained, data, tmp_path / "out", "--clip", str(tmp_path / "none.pth"), "--clip-sha256", "00")
