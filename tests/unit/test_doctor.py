"""Checks of `lrm doctor`: findings, remedies, and the requirements of `lrm fit`."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lrm_pl.cli.weights import WeightsFile
from lrm_pl.cluster.checks import folders, inputs, machine, nodes
from lrm_pl.cluster.checks.findings import Finding, merge_findings, print_table
from lrm_pl.cluster.checks.requirements import process_count, read_requirements
from lrm_pl.cluster.checks.versions import REQUIREMENTS, version, versions
from lrm_pl.cluster.doctor import main
from lrm_pl.data.manifest import read_manifest, write_manifest
from lrm_pl.data.mixture import DataSet
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.weights.catalog import WEIGHT_FILES
from lrm_pl.weights.resolve import cached_path

# Lightning 2.6.6 uses names that jsonargparse has deprecated.
pytestmark = pytest.mark.filterwarnings("default")

LIGHTNING = Requirement("lightning>=2.6.6")


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """An empty working folder outside of Slurm, with an empty cache of weights."""
    for name in ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(outside, shards):
    """A config that needs one file of weights, lpips_alex."""
    path = outside / "layer.yaml"
    layer = {
        "model": {"objective": {"lpips": 0.0}},
        "data": {"folder": str(shards), "batch_size": 2, "side_views": 1, "unseen_views": 2, "workers": 0},
        "weights": {"pretrained": False, "source": "pypi"},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    path.write_text(yaml.safe_dump(layer))
    return path


@pytest.fixture
def requirements(config):
    return read_requirements(["-c", str(config)])


def run(capsys, *arguments):
    """Run the doctor, and return its exit status and output."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_a_run_with_all_requirements_passes_and_a_run_without_shards_fails(config, outside, capsys):
    file = outside / "alex.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    given = ["-c", config, f"--weights.lpips_alex.path={file}", f"--weights.lpips_alex.sha256={digest}"]
    status, output = run(capsys, *given)
    assert status == 0, output
    assert "4 training objects, 2 held out" in output
    status, output = run(capsys, *given, f"--data.folder={outside / 'none'}")
    assert status == 1
    assert f"missing: shards: run `make render-shards OUT={outside / 'none'}`" in output


def test_an_indivisible_batch_size_is_reported_with_divisible_sizes(config, capsys):
    status, output = run(capsys, "-c", config, "--gpus=0", "--processes=4", "--data.batch_size=6")
    assert status == 1
    assert "use 4 or 8 objects per optimizer step" in output


def test_the_batch_size_must_be_divisible_by_accumulated_batches(requirements):
    assert (
        inputs.batch(dataclasses.replace(requirements, nodes=2, accumulate=2, batch_size=8)).verdict == "ok"
    )
    finding = inputs.batch(dataclasses.replace(requirements, nodes=2, accumulate=2, batch_size=2))
    assert finding.verdict == "missing"
    assert "use 4 objects per optimizer step" in finding.remedy


def test_requirements_are_read_from_the_arguments_of_fit(config):
    given = [
        "-c",
        str(config),
        "--trainer.num_nodes=3",
        "--trainer.accumulate_grad_batches=2",
        "--data.workers=5",
    ]
    requirements = read_requirements([*given, "--trainer.devices=2", "--model.objective.lpips=1"])
    assert (requirements.nodes, requirements.processes, requirements.gpus, requirements.accumulate) == (
        3,
        2,
        0,
        2,
    )
    assert (requirements.views, requirements.workers, requirements.batch_size) == (4, 5, 2)
    assert list(requirements.weights) == ["lpips_vgg", "lpips_alex"]


def test_all_data_sets_of_a_mixture_are_checked(config, shards, tmp_path):
    def check(also):
        requirements = read_requirements(["-c", str(config), f"--data.also=[{{folder: {also}, weight: 3}}]"])
        return inputs.shards(requirements)[0]

    write_synthetic_shards(tmp_path / "other", train=4, val=2, views=6, resolution=32)
    assert check(tmp_path / "other").verdict == "ok"
    assert "16 training objects, 4 held out" in check(tmp_path / "other").found, "4 once, 4 three times"
    assert check(shards).remedy == "list each data set once, with its weight"
    missing = check(tmp_path / "nowhere")
    assert missing.verdict == "missing"
    assert "nowhere" in missing.found


def test_encoder_weights_are_checked_if_the_encoder_is_pretrained(config):
    requirements = read_requirements(["-c", str(config), "--weights.pretrained=true"])
    assert list(requirements.weights) == ["dino_vitb16", "lpips_alex"]


def test_invalid_arguments_of_fit_are_reported_in_the_table(config, capsys):
    status, output = run(capsys, "-c", config, "--trainer.devicess=2")
    assert status == 1
    assert "missing: config: correct the arguments; see `lrm fit --help`" in output
    assert "devicess" in output


@pytest.mark.parametrize(
    ("devices", "count"), [(2, 2), ("2", 2), ("auto", 8), (-1, 8), ([0, 3, 5], 3), ("0,3", 2), ("3,", 1)]
)
def test_devices_are_counted_as_by_lightning(devices, count):
    assert process_count(devices, 8) == count


def test_a_truncated_shard_is_reported(requirements, shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    tar = next(copy.glob("train-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    (finding,) = inputs.shards(dataclasses.replace(requirements, sets=(DataSet(str(copy)),)))
    assert finding.verdict == "missing"
    assert "found a damaged file" in finding.found
    assert "elete this file" in finding.remedy


def test_too_few_views_or_objects_are_reported(requirements):
    few = dataclasses.replace(requirements, views=9, batch_size=5)
    shards, views = inputs.shards(few)
    assert (shards.verdict, views.verdict) == ("missing", "missing")
    assert "lower --data.batch_size" in shards.remedy
    assert "VIEWS=9" in views.remedy


@pytest.mark.parametrize(
    ("render", "output"), [({"resolution": 24}, "found 24"), ({"normalize": "cube"}, "normalized to a cube")]
)
def test_shards_that_fit_would_reject_are_reported(requirements, shards, tmp_path, render, output):
    copy = shutil.copytree(shards, tmp_path / "copy")
    manifest = read_manifest(copy)
    write_manifest(copy, dataclasses.replace(manifest, render=manifest.render | render))
    (finding,) = inputs.shards(dataclasses.replace(requirements, sets=(DataSet(str(copy)),)))
    assert finding.verdict == "missing"
    assert output in finding.found


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    finding = folders.writable("run folder", tmp_path / "file" / "runs")
    assert finding.verdict == "missing"
    assert "Not a directory" in finding.found
    good = folders.writable("run folder", tmp_path / "runs")
    assert "writable" in good.found
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("gigabytes", "verdict"), [(0, "missing"), (1.9, "missing"), (3, "warning"), (21, "ok")]
)
def test_free_space_determines_the_verdict(gigabytes, verdict):
    assert folders.free_space("run folder", Path("runs"), int(gigabytes * 2**30)).verdict == verdict


def test_an_unshared_folder_is_detected_by_missing_tokens(tmp_path):
    folders.write_token(tmp_path / "a", "7", "n0")
    folders.write_token(tmp_path / "b", "7", "n1")  # as if n1 had mounted a different disk
    assert folders.unseen_tokens(tmp_path / "a", "7", ["n0", "n1"], 0.0) == ["n1"]
    folders.write_token(tmp_path / "a", "7", "n1")
    assert folders.unseen_tokens(tmp_path / "a", "7", ["n0", "n1"], 0.0) == []
    assert folders.unseen_tokens(tmp_path / "a", "8", ["n0"], 0.0) == ["n0"], (
        "tokens of other jobs are ignored"
    )
    assert folders.shared("run folder, shared", tmp_path, ["n1"], needed=True).verdict == "missing"
    assert folders.shared("cache, shared", tmp_path, ["n1"], needed=False).verdict == "warning"


def test_weights_in_the_cache_are_verified(outside, monkeypatch):
    artifact = next(artifact for artifact in WEIGHT_FILES["lpips_alex"] if artifact.provider == "official")
    path = cached_path(artifact)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    finding = inputs.weights("lpips_alex", WeightsFile(), "official")
    assert (finding.verdict, finding.remedy) == ("missing", "delete it and run again")
    assert "damaged" in finding.found


def test_unavailable_weights_are_reported_and_nothing_is_downloaded(outside, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a closed port: no network
    monkeypatch.delenv("no_proxy", raising=False)
    finding = inputs.weights("lpips_alex", WeightsFile(), "official")
    assert finding.verdict == "missing"
    assert "unavailable from official download" in finding.found
    assert str(outside / "cache" / "weights" / "official" / "alexnet-owt-7be5be79.pth") in finding.remedy
    assert not (outside / "cache").exists()


def test_a_release_with_malware_has_its_own_remedy():
    finding = version(LIGHTNING, "2.6.3")
    assert (finding.verdict, "malware" in finding.remedy) == ("missing", True)
    assert version(LIGHTNING, "2.6.5").remedy == "run pip install 'lightning>=2.6.6'"
    assert version(LIGHTNING, "2.7.0").verdict == "ok"
    assert all(finding.verdict == "ok" for finding in versions())


def test_the_required_versions_match_pyproject(root):
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(REQUIREMENTS) <= set(declared)


def test_too_few_gpus_are_reported(requirements):
    finding = machine.gpus(dataclasses.replace(requirements, gpus=1000))
    assert finding.verdict == "missing"
    assert "GPUS=0" in finding.remedy


def test_little_shared_memory_is_a_warning_only_with_data_workers():
    assert machine.shared_memory_of(64 << 20, 2).verdict == "warning"
    assert machine.shared_memory_of(64 << 20, 0).verdict == "ok"


def test_more_data_workers_than_cpus_are_a_warning(requirements):
    assert (
        machine.processors(dataclasses.replace(requirements, processes=1000, workers=4)).verdict == "warning"
    )


def test_equal_findings_of_nodes_are_merged_into_one_row():
    same, disk = Finding("python", "3.11.7"), Finding("cache", "full", missing="free some")
    table = merge_findings({"n0": [same, Finding("cache", "fine")], "n1": [same, disk], "n2": [same, disk]})
    assert [(row.check, nodes, row.found, row.verdict) for nodes, row in table] == [
        ("python", "", "3.11.7", "ok"),
        ("cache", "n0", "fine", "ok"),
        ("cache", "n1, n2", "full", "missing"),
    ]


def test_different_findings_of_a_uniform_check_are_reported():
    shards = [Finding("shards", f"10 objects ({digest})", uniform=True) for digest in ("aa", "bb")]
    table = merge_findings({"n0": shards[:1], "n1": shards[1:]})
    assert [row.verdict for _, row in table] == ["missing", "missing"]


def test_the_table_escapes_brackets_and_passes_with_warnings(capsys):
    assert print_table(merge_findings({"": [Finding("a", "[/red] n[0-1]", warning="see [this]")]}))
    output = capsys.readouterr().out
    assert "[/red] n[0-1]" in output
    assert "warning: a: see [this]" in output


def test_findings_can_be_converted_to_json():
    finding = Finding("a", "b", "c", "d", uniform=True)
    assert Finding(**json.loads(json.dumps(dataclasses.asdict(finding)))) == finding


def test_only_encoder_weights_in_the_catalog_are_checked(config):
    def names(encoder):
        chosen = ["--weights.pretrained=true", f"--model.lrm.encoder.name={encoder}"]
        return list(read_requirements(["-c", str(config), *chosen]).weights)

    assert names("vit_small_patch14_dinov2") == ["dinov2_vits14", "lpips_alex"]
    assert names("vit_tiny_patch16_224") == ["lpips_alex"], "weights on the Hugging Face Hub are not checked"


def act_as_node(index, port, slow, results):
    """Exchange values as one of three nodes, of which one closes the exchange late."""
    os.environ |= {"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": str(index), "SLURMD_NODENAME": f"n{index}"}
    nodes.rendezvous_address = lambda: ("127.0.0.1", port)
    exchange = nodes.NodeExchange()
    found = exchange.all_gather("findings", f"c{index}")
    time.sleep(0.5 * (index == slow))
    exchange.close()
    results.put(found)


@pytest.mark.parametrize("slow", [0, 2])
def test_the_store_is_closed_after_all_nodes_have_read_the_findings(slow):
    """Forked processes act as nodes. The store ends with the process of node 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=act_as_node, args=(index, port, slow, results)) for index in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(100)
    assert found == [["c0", "c1", "c2"]] * 3
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_an_unresolvable_name_of_the_first_node_is_reported(config, monkeypatch, capsys):
    for name, value in (
        ("SLURM_STEP_NUM_NODES", "2"), ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_NODEID", "1"), ("SLURMD_NODENAME", "n1"), ("SLURM_JOB_ID", "1"),
        ("SLURM_LOCALID", "0"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    address = "no.such.host.invalid", 15005
    monkeypatch.setattr("lrm_pl.cluster.checks.nodes.rendezvous_address", lambda: address)
    status, output = run(capsys, "-c", config)
    assert status == 1
    assert "make the name no.such.host.invalid resolve to the first node" in output
