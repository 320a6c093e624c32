"""Tests of evaluation metrics, records, pages and comparisons with values computed by hand."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lrm_pl.data.manifest import Manifest
from lrm_pl.data.schema import SampleError, encode_image
from lrm_pl.data.surface import SURFACE_POINTS, encode_surface
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.errors import InputError
from lrm_pl.evaluation.comparison import pair_records
from lrm_pl.evaluation.features import set_distances
from lrm_pl.evaluation.objects import PerceptualMetrics, decode_over_white, measure_object
from lrm_pl.evaluation.page import rank_objects, render_page
from lrm_pl.evaluation.protocols import PROTOCOLS, Protocol
from lrm_pl.evaluation.records import ObjectRecord, open_evaluation, read_object, write_object
from lrm_pl.evaluation.summary import markdown, mean_cells, means, paired_differences
from lrm_pl.evaluation.surfaces import rotation_grid
from lrm_pl.geometry.cameras import InputCamera, PosedCamera, canonicalize
from lrm_pl.inference.scene import Scene
from lrm_pl.meshing.mesh import Mesh
from lrm_pl.meshing.surface import NoSurfaceError
from lrm_pl.meshing.triangles import sample_surface
from lrm_pl.metrics import ssim
from tests.builders import lumps, tiny_pretrained

RNG = np.random.default_rng


def record(key, **metrics):
    return ObjectRecord(key, {"model": {name: float(value) for name, value in metrics.items()}})


def test_paired_differences_have_the_confidence_interval_of_students_t():
    a = [record(str(k), psnr=v) for k, v in enumerate((20, 22, 24, 30))]
    b = [record(str(k), psnr=v) for k, v in enumerate((21, 24, 27, 34))]  # +1, +2, +3, +4
    found = paired_differences(pair_records(a, b))["psnr"]
    reach = 3.182446305 * math.sqrt(5 / 3 / 4)  # t of 3 degrees of freedom, times the standard error
    assert (found.mean, found.objects) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - reach, 2.5 + reach))
    assert paired_differences(pair_records(b, a))["psnr"].mean == -2.5
    with pytest.raises(InputError, match="at least two objects in both evaluations"):
        paired_differences(pair_records(a[:1], b))


def test_means_skip_objects_without_the_metric_and_list_the_model_first():
    records = [
        ObjectRecord("b", {"a baseline": {"psnr": 1.0}, "model": {"psnr": 10.0, "chamfer": 0.5}}),
        ObjectRecord("a", {"a baseline": {"psnr": 3.0}, "model": {"psnr": 20.0}}),
    ]
    found = means(records)
    assert list(found) == ["model", "a baseline"]
    assert found == {"model": {"psnr": 15.0, "chamfer": 0.5}, "a baseline": {"psnr": 2.0}}
    assert markdown(mean_cells(found, {"psnr": True, "chamfer": False, "ssim": True})).splitlines() == [
        "| prediction | psnr ↑ | chamfer ↓ |",
        "|---|---:|---:|",
        "| model | 15.00 | 0.5000 |",
        "| a baseline | 2.00 | - |",
    ]


def test_fid_of_shifted_features_is_the_squared_shift_and_kid_of_equal_distributions_is_near_zero():
    features = RNG(0).normal(size=(400, 4)).astype(np.float32)
    shift = np.array((1, 2, 0, 0), dtype=np.float32)
    other = RNG(1).normal(size=(400, 4)).astype(np.float32)
    found = set_distances({"target": features, "model": features + shift, "other": other})
    assert found["model"]["fid"] == pytest.approx(5, rel=1e-3)
    assert abs(found["other"]["kid"]) < 0.05 < found["model"]["kid"]


class Given(Scene):
    """Scene with a given mesh."""

    def __init__(self, mesh):
        object.__setattr__(self, "given", mesh)

    def mesh(self, resolution):
        if self.given is None:
            raise NoSurfaceError("nothing there")
        return self.given


def test_metrics_are_averaged_over_inputs_and_targets_and_exclude_the_target_equal_to_the_input(monkeypatch):
    sample = synthetic_sample("a", 4, 32, 0)
    protocol = Protocol("two", "", inputs=(0, 1), targets=(0, 1, 2))
    drawn = [torch.full((3, 3, 32, 32), 0.5), torch.full((3, 3, 32, 32), 0.25)]
    calls = iter(drawn)
    monkeypatch.setattr("lrm_pl.evaluation.objects._render", lambda *_: next(calls))
    baselines = {"gray": torch.full((3, 1, 1), 0.75), "copy": None}
    tf32 = set()

    def embed(images):
        tf32.add(torch.backends.cudnn.allow_tf32)
        return images.mean((2, 3))

    perceptual = PerceptualMetrics({}, clip=embed, features=embed)
    found, files = measure_object(sample, protocol, lambda *_: Given(None), perceptual, baselines)
    targets = decode_over_white(sample, (0, 1, 2))

    def psnr(images, targets):
        return (-10 * torch.log10((images - targets).square().mean((1, 2, 3)))).tolist()

    assert found.rows["model"]["psnr"] == pytest.approx(
        np.mean(psnr(drawn[0], targets) + psnr(drawn[1], targets))
    )
    assert found.rows["model"]["ssim"] == pytest.approx(
        torch.cat([ssim(images, targets) for images in drawn]).mean().item(), abs=1e-6
    )
    assert found.rows["gray"]["psnr"] == pytest.approx(np.mean(psnr(torch.full_like(targets, 0.75), targets)))
    copied = psnr(targets[:1], targets[1:]) + psnr(targets[1:2], targets[[0, 2]])
    assert found.rows["copy"]["psnr"] == pytest.approx(np.mean(copied))
    assert found.rows["gray"]["clip"] < 1
    assert found.files == tuple(files) == (".png", ".npz")
    with np.load(io.BytesIO(files[".npz"])) as features:
        shapes = {name: features[name].shape for name in features.files}
    assert shapes == {"target": (3, 3), "model": (6, 3), "gray": (3, 3), "copy": (6, 3)}
    assert Image.open(io.BytesIO(files[".png"])).size == (32 * 7, 32)
    assert tf32 == {False}
    assert torch.backends.cudnn.allow_tf32


def test_surface_metrics_are_computed_and_an_empty_field_is_noted(monkeypatch):
    sample = synthetic_sample("a", 12, 32, 0, surface=True)
    monkeypatch.setattr("lrm_pl.evaluation.objects._render", lambda *_: torch.zeros(4, 3, 32, 32))
    vertices, faces = lumps()
    scene = Given(Mesh(vertices, faces, vertices))
    found, files = measure_object(
        sample, PROTOCOLS["geometry-posed"], lambda *_: scene, PerceptualMetrics({}), {}
    )
    assert set(files) == {".png"}
    assert set(found.rows["model"]) == {
        "chamfer",
        "f_score@0.1",
        "f_score@0.2",
        "f_score@0.5",
        "normal_consistency",
    }
    assert 0.01 < found.rows["model"]["chamfer"] < 0.6
    again, _ = measure_object(
        sample, PROTOCOLS["geometry-posed"], lambda *_: scene, PerceptualMetrics({}), {}
    )
    assert again == found

    found, _ = measure_object(
        sample, PROTOCOLS["geometry-posed"], lambda *_: Given(None), PerceptualMetrics({}), {}
    )
    # without points, the F-score is 0 and distances are undefined
    assert found.rows == {"model": {"f_score@0.1": 0, "f_score@0.2": 0, "f_score@0.5": 0}}
    assert found.notes == ("view 0: nothing there",)


@pytest.mark.parametrize("name", ["geometry-posed", "geometry"])
def test_the_true_mesh_has_a_small_distance_and_its_mirror_image_has_a_large_distance(name, monkeypatch):
    monkeypatch.setattr("lrm_pl.evaluation.surfaces._STEPS", (12, 12, 6))
    rotation_grid.cache_clear()
    monkeypatch.setattr("lrm_pl.evaluation.objects._render", lambda *_: torch.zeros(4, 3, 32, 32))
    vertices, faces = lumps()
    x, y, z = vertices.T.astype(np.float64)
    vertices = 0.6 * np.stack([x + 0.5 * y**2 + 0.4 * z, y, 0.7 * z + 0.5 * y * x], axis=1)  # no symmetry
    world = sample_surface([(vertices, faces)], SURFACE_POINTS, RNG(0))
    sample = synthetic_sample("a", 12, 32, 0)
    extras = {**sample.extras, "surface.npy": encode_surface(*world)}
    sample = dataclasses.replace(sample, extras=extras)

    def measured(mirror):
        # the object as a perfect network gives it: in the frame in which the input camera is the canonical one
        c2w = torch.from_numpy(sample.c2w[[0]]).double()
        to_canonical = (canonicalize(c2w.float()).double() @ c2w.inverse())[0].numpy()
        ours = (vertices @ to_canonical[:3, :3].T + to_canonical[:3, 3]) * (mirror, 1, 1)
        scene = Given(Mesh(ours.astype(np.float32), faces, np.zeros_like(ours, dtype=np.float32)))
        record, _ = measure_object(sample, PROTOCOLS[name], lambda *_: scene, PerceptualMetrics({}), {})
        return record.rows["model"]

    own, mirrored = measured(1), measured(-1)
    rotation_grid.cache_clear()
    assert own["chamfer"] < 0.02  # half the distance of neighbors among 10,000 points
    assert own["f_score@0.1"] == 1
    assert own["normal_consistency"] > 0.97
    assert mirrored["chamfer"] > 3 * own["chamfer"]


def test_a_fully_transparent_input_view_is_a_sample_error():
    sample = synthetic_sample("a", 12, 32, 0, surface=True)
    empty = encode_image(np.zeros((32, 32, 4), dtype=np.uint8))
    sample = dataclasses.replace(sample, views=(empty, *sample.views[1:]))
    with pytest.raises(
        SampleError, match="sample 'a': expected an object in view 0, but found only transparent pixels"
    ):
        measure_object(sample, PROTOCOLS["geometry-posed"], lambda *_: Given(None), PerceptualMetrics({}), {})


def test_non_finite_renderings_are_rejected_with_the_id_of_the_sample(monkeypatch):
    drawn = torch.full((4, 3, 32, 32), 0.5)
    drawn[2, 0, 5, 5] = torch.nan
    monkeypatch.setattr("lrm_pl.evaluation.objects._render", lambda *_: drawn)
    sample = synthetic_sample("a", 4, 32, 0)
    protocol = Protocol("one", "", inputs=(0,), targets=(0, 1, 2, 3))
    with pytest.raises(
        InputError, match=r"sample 'a': expected finite rendered images, .*Use an earlier checkpoint"
    ):
        measure_object(sample, protocol, lambda *_: Given(None), PerceptualMetrics({}), {})


def test_a_comparison_includes_only_common_objects_and_metrics():
    a = [record("a", chamfer=0.1, f=1.0), record("b", chamfer=0.1, f=1.0), record("c", chamfer=0.9, f=0.5)]
    b = [
        record("a", chamfer=0.2, f=1.0),
        record("b", chamfer=0.3, f=1.0),
        record("c", f=0.0),
        record("d", f=1.0),
    ]
    rows = means(pair_records(a, b))
    assert rows["A"] == pytest.approx({"chamfer": 0.1, "f": 2.5 / 3})
    assert rows["B"] == pytest.approx({"chamfer": 0.25, "f": 2 / 3})


def test_an_object_without_a_surface_ranks_as_the_worst():
    records = [record(str(k), chamfer=0.1 * k, f=1.0) for k in range(6)] + [record("none", f=0.0)]
    chosen = rank_objects(records, "chamfer", more_is_better=False)
    assert [found.id for found in chosen["worst"]] == ["none", "5", "4"]
    assert [found.id for found in chosen["best"]] == ["0", "1"]  # 2 is among the median ones


def test_the_folder_of_a_different_evaluation_is_rejected(tmp_path):
    open_evaluation(tmp_path, {"protocol": {"name": "lrm"}, "limit": 3})
    open_evaluation(tmp_path, {"limit": 3, "protocol": {"name": "lrm"}})
    open_evaluation(tmp_path / "b", {"baselines": False, "limit": 3})
    assert open_evaluation(tmp_path / "b", {"baselines": True, "limit": 3})["baselines"] is True
    with pytest.raises(
        InputError, match=r"found True in the folder. Pass --baseline, or choose another folder with --out"
    ):
        open_evaluation(tmp_path / "b", {"baselines": False, "limit": 3})
    with pytest.raises(
        InputError, match=r"expected limit 4, but found 3 in the folder. Choose another folder with --out"
    ):
        open_evaluation(tmp_path, {"protocol": {"name": "lrm"}, "limit": 4})


def test_moved_weights_and_shards_resume_an_evaluation_and_different_weights_do_not(tmp_path):
    first = {"network": {"source": "run", "step": 5, "sha256": "a"}, "data": {"folder": "x", "shards": "c"}}
    moved = {
        "network": {"source": "out", "step": None, "sha256": "a"},
        "data": {"folder": "y", "shards": "c"},
    }
    assert open_evaluation(tmp_path, first) == first
    assert open_evaluation(tmp_path, moved) == first
    with pytest.raises(InputError, match=r"expected network \{'sha256': 'b'\}, but found"):
        open_evaluation(tmp_path, first | {"network": {"source": "run", "step": 5, "sha256": "b"}})


def test_records_round_trip_and_a_damaged_record_is_rejected(tmp_path):
    open_evaluation(tmp_path, {})
    assert read_object(tmp_path, "a") is None
    written = ObjectRecord("a", {"model": {"psnr": 12.5}}, ("a note",), files=(".png",))
    write_object(tmp_path, written, {".png": b"content"})
    assert read_object(tmp_path, "a") == written
    (tmp_path / "objects" / "a.png").unlink()
    assert read_object(tmp_path, "a") is None
    (tmp_path / "objects" / "a.json").write_text('{"id": "a"}')
    with pytest.raises(InputError, match="expected the record of an object, but found KeyError"):
        read_object(tmp_path, "a")


def test_the_page_shows_each_object_once_and_escapes_names(tmp_path):
    records = [record(f"<b>{k}", psnr=float(k)) for k in range(12)]
    chosen = rank_objects(records, "psnr", more_is_better=True)
    assert [[r.id for r in part] for part in chosen.values()] == [
        ["<b>0", "<b>1", "<b>2", "<b>3"], ["<b>4", "<b>5", "<b>6", "<b>7"], ["<b>11", "<b>10", "<b>9", "<b>8"],
    ]  # fmt: skip
    few = rank_objects(records[:2], "psnr", more_is_better=False)
    assert sorted(r.id for part in few.values() for r in part) == ["<b>0", "<b>1"]
    page = render_page("T<", {"a": "<script>"}, means(records), {"psnr": True}, records, tmp_path)
    assert "<script>" not in page
    assert "&lt;b&gt;11" in page


def test_the_page_of_a_single_object_has_no_empty_sections(tmp_path):
    records = [record("a", psnr=1.0)]
    page = render_page("T", {}, means(records), {"psnr": True}, records, tmp_path)
    assert page.count("<h2>") == 1


def test_a_protocol_rejects_shards_without_the_required_views():
    with pytest.raises(
        InputError,
        match=r"at least 15 views per object for the protocol 'lrm', but found 8. Render the shards with VIEWS=15",
    ):
        PROTOCOLS["lrm"].check_manifest(Manifest((), 8, 0, {}), "data")
    with pytest.raises(
        InputError,
        match=r"expected the camera preset 'gso-orbit' .* found 'frame'. Render the shards with ARGS",
    ):
        PROTOCOLS["gso-orbit"].check_manifest(Manifest((), 24, 0, {"preset": "frame"}), "data")


def test_the_network_receives_the_known_camera_of_the_image():
    """Use an off-center camera that does not look at the origin, as in crops of videos."""
    pipeline = tiny_pretrained()
    image = torch.rand(3, 32, 32)
    usual = InputCamera(2.2, 60.0)
    c2w = usual.c2w.clone()
    c2w[:3, 3] += torch.tensor([0.2, 0.0, -0.1])
    fxfycxcy = usual.fxfycxcy + torch.tensor([0.0, 0.05, 0.1, -0.07])
    told = []
    pipeline.network.register_forward_pre_hook(lambda network, given: told.extend(given[1:]))
    scene = pipeline(image, PosedCamera(c2w, fxfycxcy))
    assert torch.equal(told[0][0, 0], c2w)
    assert torch.equal(told[1][0, 0], fxfycxcy)
    assert scene.camera.distance == pytest.approx(float(c2w[:3, 3].norm()))
    assert scene.camera.fov_deg == pytest.approx(60, abs=1e-4)
