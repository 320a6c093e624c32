"""Training data of the command line: validation, skipped samples and mixtures."""

import dataclasses
import io
import re
import shutil

import pytest
from PIL import Image

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import main
from lrm_pl.data.manifest import Manifest, write_manifest
from lrm_pl.data.schema import encode_sample
from lrm_pl.data.synthetic import synthetic_sample, write_synthetic_shards
from lrm_pl.data.tar import write_shard

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


def test_an_indivisible_batch_size_is_rejected_before_the_first_step(tiny):
    with pytest.raises(
        SystemExit, match=r"divisible by 3 processes times 1 accumulated batches, but found 2. Use 3 objects"
    ):
        main(["fit", *tiny, "--trainer.accelerator", "cpu", "--trainer.devices", "3"])
    with pytest.raises(
        SystemExit, match=r"divisible by 1 processes times 4 accumulated batches, but found 2"
    ):
        main(["fit", *tiny, "--trainer.accumulate_grad_batches", "4"])


def test_fewer_samples_than_the_batch_size_are_rejected_before_the_first_step(tiny):
    with pytest.raises(SystemExit, match=r"expected at least 6 samples .* found 4. .* --data.batch_size 4"):
        main(["fit", *tiny, "--data.batch_size", "6"])


def test_cube_normalized_shards_are_rejected_for_sphere_bounds(tiny, tmp_path, shards):
    cube = tmp_path / "cube"
    shutil.copytree(shards, cube)
    manifest = cube / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sphere"', '"cube"'))
    with pytest.raises(SystemExit, match=r"found shards normalized to a cube.*--model\.renderer\.bounds box"):
        main(["fit", *tiny, "--data.folder", str(cube)])


def test_crops_that_are_too_small_for_lpips_are_rejected_before_training(tiny):
    small = ("--data.crop.size=8", "--data.crop.low=8", "--data.crop.high=16", "--model.objective.lpips=1")
    with pytest.raises(SystemExit, match="expected crops of at least 16 pixels for LPIPS, but found 8"):
        main(["fit", *tiny, *small])


def test_missing_and_truncated_shards_are_rejected_with_a_remedy(tiny, tmp_path, shards):
    with pytest.raises(SystemExit, match=r"expected finished shards in .*nowhere.*make render-shards OUT="):
        main(["fit", *tiny, "--data.folder", str(tmp_path / "nowhere")])
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = broken / "train-000001.tar"
    size = tar.stat().st_size
    with open(tar, "r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        SystemExit, match=f"expected {size} bytes, but found a damaged file of {size - 1000} bytes"
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


def test_a_sample_with_a_view_that_is_not_rgba_is_skipped(tiny, tmp_path, caplog):
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
def test_a_corrupt_sample_is_reported_and_skipped(tiny, tmp_path, shards, caplog, damage):
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


def test_more_views_than_in_the_shards_are_rejected_with_a_command(tiny):
    with pytest.raises(
        SystemExit, match=r"expected at least 12 views per object.*found 8.*make render-shards VIEWS=12"
    ):
        main(["fit", *tiny, "--data.side_views", "9"])


def test_the_number_of_input_views_is_a_setting_of_the_network(tiny, tmp_path):
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


def test_training_and_evaluation_on_a_mixture_of_data_sets(tiny, tmp_path, shards, capsys):
    other = tmp_path / "other"
    write_synthetic_shards(other, train=3, val=1, views=6, resolution=32)
    main(["fit", *tiny, f"--data.also=[{{folder: {other}, weight: 3}}]"])
    assert "unseen views of the training objects: 14 images of 7 objects" in capsys.readouterr().out
