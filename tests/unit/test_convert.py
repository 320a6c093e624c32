"""Tests of ``lrm convert``: strict conversion to model folders."""

import pickle
import random
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lrm_pl.apps.convert import main
from lrm_pl.inference.model_folder import build_network
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.weights.key_map import ConversionError, Hyperparameters, read_tensor_file
from lrm_pl.weights.openlrm import convert_openlrm
from lrm_pl.weights.resolve import WeightsError
from lrm_pl.weights.triposr import convert_triposr
from tests.parity.networks import randomized
from tests.parity.openlrm import OpenLRM
from tests.parity.triposr import TripoSR

SIZES = ["--heads", "4", "--encoder-heads", "3", "--image-size", "112", "--samples-per-ray", "16"]
NUMBERS = Hyperparameters(4, 3, 112, 16)
NETWORKS = {"openlrm": (OpenLRM, convert_openlrm), "triposr": (TripoSR, convert_triposr)}


def state(source="openlrm"):
    return {name: x.contiguous() for name, x in randomized(NETWORKS[source][0](), 0).state_dict().items()}


@pytest.mark.parametrize(
    ("source", "ending"), [("openlrm", "safetensors"), ("triposr", "ckpt"), ("openlrm", "pth")]
)
def test_a_converted_folder_contains_the_network_and_the_report_lists_all_keys(
    source, ending, tmp_path, capsys
):
    weights, out = tmp_path / f"model.{ending}", tmp_path / "out"
    tensors = state(source)
    save_file(tensors, weights) if ending == "safetensors" else torch.save(tensors, weights)
    main(["--from", source, str(weights), str(out), *SIZES])
    printed = capsys.readouterr().out
    assert all(key in printed for key in tensors), "the report contains all keys"
    assert f"lrm fit -c {out}/config.yaml" in printed
    pipeline = LRMPipeline.from_pretrained(out)
    network, renderer = pipeline.network, pipeline.renderer
    expected = NETWORKS[source][1](tensors, NUMBERS)
    assert all(torch.equal(x, expected.weights[name]) for name, x in network.state_dict().items())
    assert renderer.march.samples == 16
    assert yaml.safe_load((out / "config.yaml").read_text())["model"] == expected.model


def change(tensors, key, value):
    return {**tensors, key: value}


@pytest.mark.parametrize(
    ("change_state", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "transformer.norm.bias"}, r"transformer\.norm\.bias is missing"),
        (lambda s: change(s, "transformer.extra", torch.zeros(3)), r"transformer\.extra \(3,\) is unexpected"),
        (lambda s: change(s, "upsampler.bias", torch.zeros(9)), r"upsampler\.bias has shape \(9,\) instead of \(8,\)"),
        (lambda s: change(s, "upsampler.bias", torch.full((8,), torch.nan)), r"has non-finite values"),
        (lambda s: change(s, "upsampler.bias", torch.zeros(8, dtype=torch.long)), r"expected floating-point tensors"),
        (lambda s: {"state": s["pos_embed"]}, r"expected the key 'pos_embed', but found 'state'"),
    ],
)  # fmt: skip
def test_missing_unexpected_and_invalid_tensors_are_errors_and_nothing_is_written(
    change_state, message, tmp_path
):
    save = change_state(state())
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file(save, weights)
    with pytest.raises(SystemExit, match=message):
        main(["--from", "openlrm", str(weights), str(out), *SIZES])
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(("source", "other"), [("openlrm", "triposr"), ("triposr", "openlrm")])
def test_weights_of_a_different_architecture_are_rejected(source, other):
    with pytest.raises(ConversionError, match="Check that the file contains weights of this network"):
        NETWORKS[source][1](state(other), NUMBERS)


def test_the_error_lists_all_differences():
    tensors = state("triposr")
    for key in ("backbone.norm.weight", "decoder.layers.2.bias"):
        del tensors[key]
    tensors["lora"] = torch.zeros(1)
    with pytest.raises(ConversionError) as caught:
        convert_triposr(tensors, NUMBERS)
    for part in (
        "3 differences",
        "backbone.norm.weight is missing",
        "decoder.layers.2.bias is missing",
        "lora (1,) is",
    ):
        assert part in str(caught.value)


class _RunsCode:
    def __reduce__(self):
        return (print, ("code in the file was executed",))


def test_a_file_with_code_is_rejected(tmp_path, capsys):
    weights = tmp_path / "model.ckpt"
    weights.write_bytes(pickle.dumps({"pos_embed": _RunsCode()}, protocol=2))
    with pytest.raises(SystemExit, match="an unreadable file"):
        main(["--from", "triposr", str(weights), str(tmp_path / "out")])
    assert "code in the file was executed" not in capsys.readouterr().out


def test_the_image_size_is_required_for_unpublished_widths():
    with pytest.raises(
        ConversionError, match=r"of a published model, but found an encoder width of 48 .*Set --image-size"
    ):
        convert_openlrm(state(), Hyperparameters(4, 3))


def test_an_existing_folder_and_a_missing_file_are_errors(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="because it exists"):
        main(["--from", "openlrm", str(tmp_path / "x.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"expected weights at .*x\.pth, but found no file"):
        main(["--from", "openlrm", str(tmp_path / "x.pth"), str(tmp_path / "new")])


BASE = {"encoder_dim": 768, "encoder_depth": 12, "encoder_heads": 12}
LARGE = {**BASE, "dim": 1024, "depth": 16, "heads": 16}
SMALL = {"encoder_dim": 384, "encoder_depth": 12, "encoder_heads": 6, "dim": 512, "depth": 12, "heads": 8}
PUBLISHED = {
    "openlrm_small": (OpenLRM, {**SMALL, "channels": 32}),
    "openlrm_base": (OpenLRM, {**BASE, "dim": 768, "depth": 12, "heads": 12, "channels": 48}),
    "openlrm_large": (OpenLRM, {**LARGE, "channels": 80}),
    "triposr": (TripoSR, {**LARGE, "stored": 14, "channels": 40}),
}
#: Millions of parameters of the published models: size of the fp32 files divided by 4 bytes.
MILLIONS = {"openlrm_small": 111.4, "openlrm_base": 260.2, "openlrm_large": 452.1}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_weights_are_converted_to_the_network_of_the_preset(preset, root):
    kind, sizes = PUBLISHED[preset]
    if kind is OpenLRM:
        sizes = {**sizes, "stored": 37, "camera_dim": 1024}
    with torch.device("meta"):
        theirs = kind(side=32, **sizes)
        if preset in MILLIONS:
            assert abs(sum(p.numel() for p in theirs.parameters()) / 1e6 - MILLIONS[preset]) < 0.06
        conversion = (convert_openlrm if kind is OpenLRM else convert_triposr)(theirs.state_dict())
        network, renderer = build_network(yaml.safe_load((root / f"configs/model/{preset}.yaml").read_text()))
        converted, its_renderer = build_network(conversion.model)
    shapes = {name: x.shape for name, x in network.state_dict().items()}
    assert shapes == {name: x.shape for name, x in conversion.weights.items()}
    assert str(network) == str(converted)
    for part in ("encoder", "decoder", ""):
        ours, other = (model.get_submodule(part) for model in (network, converted))
        plain = {k: v for k, v in vars(ours).items() if not k.startswith("_")}
        assert plain == {k: v for k, v in vars(other).items() if not k.startswith("_")}
    assert vars(renderer) == vars(its_renderer)


def test_the_error_for_a_damaged_folder_names_the_reason(tmp_path):
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file(state(), weights)
    main(["--from", "openlrm", str(weights), str(out), *SIZES])
    file, config = out / "model.safetensors", out / "config.yaml"
    tensors = load_file(file)
    del tensors["transformer.tokens"]
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"found 1 difference:\n  transformer\.tokens is missing. Pass the config of"
    ):
        LRMPipeline.from_pretrained(out)
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="expected a safetensors file, but found a damaged file"):
        LRMPipeline.from_pretrained(out)
    config.write_text(config.read_text().replace("depth: 2", "depths: 2"))
    with pytest.raises(ValueError, match="expected a model section that is valid in this version"):
        LRMPipeline.from_pretrained(out)
    config.write_text("model: {lrm: {encoder: {name: no_such_vit}}}")
    with pytest.raises(ValueError, match="expected the name of a timm model, but found 'no_such_vit'"):
        LRMPipeline.from_pretrained(out)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("openlrm", ["--image-size", "100"], "image_size that is a multiple of 14, but found 100"),
        ("openlrm", ["--samples-per-ray", "4"], "samples per ray"),
        ("triposr", ["--image-size", "8"], "image_size that is a multiple of 16, but found 8"),
        (
            "triposr",
            ["--heads", "7"],
            "a number of heads that divides the width 64, but found 7. Set --heads",
        ),
    ],
)
def test_invalid_hyperparameters_are_errors_and_nothing_is_written(source, options, message, tmp_path):
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file(state(source), weights)
    with pytest.raises(SystemExit, match=message):
        main(["--from", source, str(weights), str(out), *SIZES, *options])
    assert list(tmp_path.iterdir()) == [weights]


def test_a_damaged_file_is_read_or_raises_an_error(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.arange(6.0), "b": {"c": torch.ones(2)}}, whole)
    content, damaged = whole.read_bytes(), tmp_path / "damaged.pth"
    generator = random.Random(0)
    for _ in range(60):
        corrupted = bytearray(content)
        for _ in range(4):
            corrupted[generator.randrange(len(corrupted))] = generator.randrange(256)
        damaged.write_bytes(corrupted)
        try:
            read_tensor_file(damaged, "x")
        except WeightsError:
            continue


@pytest.mark.parametrize("positions", [1, 3, 11])
def test_a_number_of_position_embeddings_that_is_not_square_is_an_error(positions):
    tensors = change(state(), "encoder.model.pos_embed", torch.zeros(1, positions, 48))
    with pytest.raises(
        ConversionError, match=f"expected a square of patches and a class token, but found {positions - 1}"
    ):
        convert_openlrm(tensors, NUMBERS)


def test_sizes_from_a_file_do_not_allocate_memory():
    tensors = change(
        state("triposr"), "image_tokenizer.model.embeddings.cls_token", torch.zeros(1, 1, 3_000_000)
    )
    with pytest.raises(ConversionError, match="has shape"):
        convert_triposr(tensors, Hyperparameters(4, 3, 112, 16))


def test_arguments_are_parsed_before_torch_is_imported(root):
    code = "import sys; from lrm_pl.apps.convert import main; assert 'torch' not in sys.modules; main(['--from', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'x'" in done.stderr
