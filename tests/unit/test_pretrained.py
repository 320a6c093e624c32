"""Tests of `LRMPipeline` with model folders and the Hugging Face Hub."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import close_session
from PIL import Image

import lrm_pl
from lrm_pl.data.batch import Batch
from lrm_pl.data.input_framing import InputFraming, measure_framing
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.model_card import rename_model_card
from lrm_pl.inference.model_folder import hash_weights
from lrm_pl.inference.options import MeshOptions
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.result_folder import infer
from tests.builders import TINY_FRAMING, tiny_pretrained
from tests.servers.hub import hub_with


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    rgba = np.zeros((50, 40, 4), dtype=np.uint8)
    rgba[10:40, 5:25] = (200, 100, 50, 255)
    Image.fromarray(rgba).save(path)
    return path


def test_the_example_in_the_readme_reconstructs_a_photo(pretrained, photo, monkeypatch, root):
    printed = re.search(
        r"```python\nfrom lrm_pl import LRMPipeline\n(.*?)```", (root / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(photo.parent)
    shutil.copytree(pretrained, "model")
    names = {}
    exec("from lrm_pl import LRMPipeline\n" + printed[1], names)
    assert len(names["mesh"].faces) > 10
    assert names["mesh"].colors.min() >= 0


def test_saved_models_round_trip(tmp_path, photo):
    model = tiny_pretrained()
    model.save_pretrained(tmp_path / "saved")
    again = lrm_pl.LRMPipeline.from_pretrained(tmp_path / "saved")
    assert hash_weights(again.network) == hash_weights(model.network)
    assert again.framing == TINY_FRAMING
    assert torch.equal(again(photo).field.planes, model(photo).field.planes)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-to-3d"
    assert "| transformer | 1 blocks of width 16 |" in card
    model.step = 1300
    model.save_pretrained(tmp_path / "stepped")
    assert (again.step, lrm_pl.LRMPipeline.from_pretrained(tmp_path / "stepped").step) == (None, 1300)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "README.md").read_text() == card.replace("saved", "twice")


def test_lrm_infer_and_the_pipeline_frame_an_image_equally(pretrained, photo, tmp_path):
    threshold = LRMPipeline.from_pretrained(pretrained)(photo).threshold
    record = infer(
        LRMPipeline.from_pretrained(pretrained), photo, tmp_path / "out", MeshOptions(resolution=32, frames=0)
    )
    assert record["threshold"] == pytest.approx(threshold, rel=1e-6), "the image is framed only once"


def test_the_model_card_on_the_hub_contains_the_name_of_the_repository(pretrained, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path, **_):
            sent.update({path.name: path.read_text("latin-1") for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = LRMPipeline.from_pretrained(pretrained)
    model.push_to_hub("me/chairs")
    assert 'LRMPipeline.from_pretrained("me/chairs")("photo.png")' in sent["README.md"]
    assert "\n# me/chairs\n" in sent["README.md"]
    assert "or `lrm infer photo.png --ckpt hf://me/chairs`." in sent["README.md"]
    assert set(sent) == {"README.md", "config.yaml", "model.safetensors", "input.yaml"}, (
        "the files that `lrm export` writes"
    )
    assert rename_model_card("a custom card", "x") == "a custom card"


def test_pillow_images_are_preprocessed_like_their_files(pretrained, photo, tmp_path):
    model = LRMPipeline.from_pretrained(pretrained)
    turned = tmp_path / "turned.png"
    with Image.open(photo) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.convert("LA").save(turned, exif=exif)
    with Image.open(turned) as image:
        assert image.mode == "LA"
        np.testing.assert_array_equal(model.preprocess(image), model.preprocess(turned))
    box = np.asarray(model.preprocess(turned))[..., 3] > 127
    assert box.any(axis=0).sum() > box.any(axis=1).sum(), "the orientation of the file is applied"


def test_a_model_folder_without_framing_logs_a_warning(pretrained, tmp_path, caplog):
    LRMPipeline.from_pretrained(pretrained)
    assert not caplog.text
    shutil.copytree(pretrained, tmp_path / "copy")
    (tmp_path / "copy" / "input.yaml").unlink()
    LRMPipeline.from_pretrained(tmp_path / "copy")
    assert "copy does not contain input.yaml. Images are framed as in the LRM paper." in caplog.text


def test_different_weights_have_different_hashes():
    model = tiny_pretrained()
    before = hash_weights(model.network)
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] += 1e-3
    assert hash_weights(model.network) != before


def test_the_framing_and_the_camera_of_training_are_used(pretrained, photo):
    model = LRMPipeline.from_pretrained(pretrained)
    image = model.preprocess(photo)
    alpha = np.asarray(image)[..., 3] / 255
    rows = np.nonzero((alpha > 0.5).any(axis=1))[0]
    assert len(rows) / len(alpha) == pytest.approx(TINY_FRAMING.foreground, abs=0.01)
    scene = model(image)
    assert scene.camera == InputCamera(2.5, 45.0)
    assert model(image, InputCamera(1.9, 40.0)).camera.distance == 1.9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "found a run without checkpoints"),
        (lambda folder: (folder / "config.yaml").write_text("a: 1"), "expected a model.lrm section"),
        (lambda folder: (folder / "input.yaml").write_text("distance: near"), "found distance"),
        (
            lambda folder: (folder / "input.yaml").write_text("[1]"),
            "expected a mapping of names to numbers, but found list",
        ),
        (lambda folder: (folder / "input.yaml").write_text("distance: -1"), "distance above 0"),
        (lambda folder: (folder / "input.yaml").write_text("foreground: 2"), "foreground in"),
    ],
)
def test_an_invalid_model_folder_is_rejected(pretrained, tmp_path, spoil, message):
    folder = tmp_path / "copy"
    shutil.copytree(pretrained, folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        LRMPipeline.from_pretrained(folder)


def test_a_name_without_a_folder_or_repository_is_rejected(monkeypatch, tmp_path):
    for name in ("no/such", "not a name"):
        with pytest.raises(InputError, match="neither: "):
            LRMPipeline.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)


def test_a_missing_path_is_not_requested_from_the_hub(pretrained, tmp_path):
    (tmp_path / "file").touch()
    for name in (tmp_path / "nosuch", "runs/lrm/version_9", "./nosuch"):
        with pytest.raises(
            InputError,
            match=f"a run, a checkpoint or a model folder at {name}, but found nothing. Correct the path",
        ):
            LRMPipeline.from_pretrained(name)
    with pytest.raises(InputError, match=f"at {tmp_path / 'file'}, but found a file"):
        LRMPipeline.from_pretrained(tmp_path / "file")
    for file in ("model.safetensors", "config.yaml"):
        assert LRMPipeline.from_pretrained(pretrained / file).framing == TINY_FRAMING


def test_an_unsupported_socks_proxy_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    close_session()  # its client has read the environment
    try:
        with pytest.raises(
            InputError, match=r"'me/tiny', but found neither: Using SOCKS proxy, but the 'socksio'"
        ):
            LRMPipeline.from_pretrained("me/tiny", cache_dir=tmp_path)
    finally:
        close_session()


@pytest.fixture
def hub(pretrained, monkeypatch):
    """Serve a hub on loopback with the repository me/tiny."""
    with hub_with(pretrained, "me/tiny", monkeypatch) as address:
        yield address


def test_a_repository_on_the_hub_is_loaded_by_name(hub, pretrained, tmp_path, photo):
    model = LRMPipeline.from_pretrained("me/tiny", cache_dir=tmp_path)
    here = LRMPipeline.from_pretrained(pretrained)
    assert hash_weights(model.network) == hash_weights(here.network)
    assert model.framing == TINY_FRAMING
    again = LRMPipeline.from_pretrained("me/tiny", cache_dir=tmp_path, local_files_only=True)
    assert hash_weights(again.network) == hash_weights(here.network)
    with pytest.raises(InputError, match="named 'me/other', but found neither"):
        LRMPipeline.from_pretrained("me/other", cache_dir=tmp_path)


def test_uint8_arrays_are_accepted_and_other_arrays_are_rejected(pretrained, photo):
    model = LRMPipeline.from_pretrained(pretrained)
    with Image.open(photo) as image:
        array = np.array(image)
    assert torch.equal(model(array).field.planes, model(photo).field.planes)
    for wrong in (array / 255, array[..., 0], np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(
            InputError, match=r"expected a uint8 array of shape \(H, W, 3\) or \(H, W, 4\), but found"
        ):
            model(wrong)


def test_commands_do_not_request_a_mistyped_path_from_the_hub(hub, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("me/tiny", "runs/tuned", "nosuch"):
        with pytest.raises(
            InputError, match=f"found nothing at {name}. Correct the path, or use hf://owner/name"
        ):
            find_model(name)
    assert LRMPipeline.from_pretrained("hf://me/tiny").sha256 == hash_weights(tiny_pretrained().network)
    for file in ("model.safetensors", "config.yaml"):
        assert LRMPipeline.from_pretrained(f"{pretrained}/{file}").source == str(pretrained)


def test_the_framing_is_measured_from_training_views():
    alpha = torch.zeros(1, 2, 20, 20)
    alpha[0, 0, 5:15, 8:12] = 1  # 10 of 20
    alpha[0, 1, 5:19, 8:12] = 1  # 14 of 20
    c2w = torch.eye(4).repeat(1, 2, 1, 1)
    c2w[0, :, :3, 3] = torch.tensor([(0, -2.4, 0), (0, 0, 2.8)])
    fxfycxcy = torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(1, 2, 1)  # 90 degrees
    from lrm_pl.data.batch import Views

    views = Views(torch.zeros(1, 2, 3, 20, 20), alpha, torch.ones(1, 2, 3), c2w, fxfycxcy, None)
    assert measure_framing([Batch(("a",), views, views, torch.ones(1))]) == InputFraming(2.6, 90.0, 0.6)
    assert measure_framing([]) is None
