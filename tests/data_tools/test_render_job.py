"""Command and script of the Slurm job that renders."""

import argparse
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.assets.scan import find_assets
from data_tools.quality.measures import CROPPED_RULE, DEFAULT_RULES
from data_tools.rendering.launch import sbatch_command
from data_tools.rendering.resume import plan_folder, write_plan
from data_tools.rendering.settings import RenderSettings, write_settings
from lrm_pl.errors import InputError

ARGUMENTS = ("--assets", "meshes", "--out", "data/mine")


@pytest.fixture
def checkout(tmp_path, root, monkeypatch):
    """Working folder with the job scripts and two meshes. Slurm is not on PATH."""
    shutil.copytree(root / "configs" / "cluster", tmp_path / "configs" / "cluster")
    (tmp_path / "meshes").mkdir()
    for name in "ab":
        (tmp_path / "meshes" / f"{name}.glb").write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def command_of(*arguments, out="data/mine", **changes):
    options = {"nodes": 8, "gpus": 0, "partition": "", "account": "", "time": ""} | changes
    return sbatch_command(argparse.Namespace(arguments=arguments, **options), Path(out))


def test_the_sbatch_command_contains_all_options(checkout, monkeypatch):
    monkeypatch.setattr("sys.executable", "/shared/my env/bin/python")
    assert command_of(*ARGUMENTS, gpus=4, partition="gpu", account="lab", time="1-00:00:00") == [
        *("sbatch", "--parsable", "--job-name=render-mine", "--nodes=8", "--gres=gpu:4", "--partition=gpu"),
        *("--account=lab", "--time=1-00:00:00", "--output=data/mine/slurm-%j.log"),
        *("configs/cluster/render.sbatch", "/shared/my env/bin", "4"),
        *("python", "-m", "data_tools", "render", "--assets", "meshes", "--out", "data/mine"),
    ]


def test_options_that_are_not_set_are_omitted_from_the_command(checkout):
    command = command_of(*ARGUMENTS)
    assert not [word for word in command if re.match("--(gres|partition|account|time)", word)]
    assert command[command.index("configs/cluster/render.sbatch") + 2] == "0", "number of GPUs for Ray"


#: Stand-ins for the programs of a node. `ray` runs the command, as on the head node, and exits with status 0.
STAND_INS = """
    SLURM_JOB_ID=$$ SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=n0 SLURM_PROCID=0; export SLURM_PROCID
    srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }
    scancel() { echo "scancel ${1#$$}"; }
    scontrol() { echo "scontrol $1"; }
    exec() { "$@"; exit; }
    PATH=$PWD:$PATH
"""
RAY = """#!/bin/sh
[ "$1" = symmetric-run ] || exit 0
touch begun
[ -e no-head ] && exit 0
while [ "$1" != -- ]; do shift; done
shift
"$@"
exit 0
"""


def node(checkout, python, *arguments):
    """Start the job script with bash. `python` is a shell script that replaces the rendering."""
    for name, text in (
        ("ray", RAY),
        ("python", f"#!/bin/sh\n[ $1 = -c ] && echo secret && exit\n{python}\n"),
    ):
        (checkout / name).write_text(text)
        (checkout / name).chmod(0o755)
    script = (checkout / "configs/cluster/render.sbatch").read_text()
    script = re.sub("(?m)^export PATH=.*", "", script).replace("/tmp/", f"{checkout}/")
    (checkout / "job.sh").write_text(STAND_INS + script)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = command_of(*arguments)
    words = command[command.index("configs/cluster/render.sbatch") + 1 :]
    return subprocess.Popen(
        ["bash", "job.sh", *words], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_exit_status_of_a_job_is_that_of_the_rendering(checkout, status):
    with node(checkout, f"echo rendering at $RAY_ADDRESS; exit {status}", *ARGUMENTS) as job:
        said = job.stdout.read()
    assert re.search(r"^rendering at \d+\.\d+\.\d+\.\d+:2\d{4}$", said, re.MULTILINE), said
    assert "rendering at 127." not in said, "other nodes cannot reach a loopback address"
    assert f"the rendering ended with status {status};" in said
    assert "scancel .0\n" in said
    assert job.returncode == status


def test_a_job_fails_if_ray_exits_without_rendering(checkout):
    (checkout / "no-head").touch()
    with node(checkout, "echo rendering", *ARGUMENTS) as job:
        said = job.stdout.read()
    assert "rendering" not in said
    assert "scancel" not in said
    assert job.returncode == 1


def test_a_job_is_requeued_at_the_time_limit(checkout):
    with node(checkout, "sleep 5", *ARGUMENTS) as job:
        until = time.monotonic() + 30
        while not (checkout / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        job.send_signal(10)  # USR1
        line = next(line for line in job.stdout if line.startswith("scontrol"))
    assert line == "scontrol requeue\n"


def test_the_job_script_does_not_expand_arguments(checkout):
    nasty = ("$(touch pwned)", "`touch pwned`", "a b", "'; touch pwned; '", '"', "${HOME}", "*", "$$", "\\")
    with node(checkout, "printf '<%s>\\n' \"$@\"", *ARGUMENTS, *nasty) as job:
        said = job.stdout.read()
    assert tuple(re.findall("<(.*)>", said))[-len(nasty) :] == nasty
    assert not (checkout / "pwned").exists()


@pytest.mark.parametrize("out", ["data/a b", "data/%j", "--uid=0", "data\n#SBATCH --uid=0"])
def test_a_folder_name_that_slurm_does_not_accept_raises_an_error(checkout, out):
    with pytest.raises(InputError, match=r"expected a value like .* for OUT"):
        command_of(*ARGUMENTS, out=out)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ((), ("--assets", "none"), "expected a folder of .* found no folder"),
        ((), ("--out", "data/$(id)"), "expected a value like .* for OUT"),
        (("--nodes=0",), (), "expected NODES of at least 1, but found 0"),
        (("--gpus=-1",), (), "expected GPUS of at least 0, but found -1"),
    ],
)
def test_invalid_options_raise_an_error_before_submission(checkout, capsys, options, arguments, message):
    given = ["launch", "--gpus=0", *options, "--dry-run", "--", *ARGUMENTS, *arguments]
    assert main(given) == 1
    assert re.search(message, capsys.readouterr().err)


def test_changed_settings_raise_an_error_before_submission(checkout, capsys):
    Path("data/mine").mkdir(parents=True)
    rules = (*DEFAULT_RULES, CROPPED_RULE)
    settings = RenderSettings("frame", "sphere", 16, 128, 16, seed=0, held_out=0, shard_size=8, rules=rules)
    out, meshes = Path("data/mine"), Path("meshes")
    assets = find_assets(meshes)
    write_plan(out, plan_folder(out, settings, assets, meshes), assets)
    write_settings(out, settings, "stand-in")
    given = ["launch", "--gpus=0", "--dry-run", "--", *ARGUMENTS, "--held-out", "0"]
    assert main(given) == 0
    assert main([*given, "--seed", "1"]) == 1
    assert "seed: expected 1, but found 0 in the folder" in capsys.readouterr().err


def test_an_unknown_argument_of_render_raises_an_error(checkout, capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--gpus=0", "--dry-run", "--", "--vews", "4"])
    assert "unrecognized arguments: --vews" in capsys.readouterr().err


def test_a_missing_slurm_raises_an_error_that_suggests_ray(checkout, capsys):
    assert main(["launch", "--nodes=8", "--gpus=0", "--", *ARGUMENTS]) == 1
    assert re.search("expected Slurm, but found no `sbatch` on PATH. .*RAY_ADDRESS=", capsys.readouterr().err)
    assert not Path("data").exists()


def test_a_dry_run_prints_the_command_and_writes_nothing(checkout, capsys):
    assert main(["launch", "--nodes=8", "--gpus=0", "--dry-run", "--", *ARGUMENTS, "--views", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("sbatch --parsable --job-name=render-mine --nodes=8 ")
    assert "python -m data_tools render --assets meshes --out data/mine --views 4\n" in said
    assert "DRY_RUN is set, so no job was submitted." in said
    assert not Path("data").exists()


def test_partitions_and_gpus_are_queried_from_slurm(checkout, capsys, monkeypatch):
    for name, text in (
        ("sinfo", "echo 'main*|4|n0|(null)'; echo 'gpu|8|n1|gpu:a100:4'"),
        ("scontrol", "echo 'NodeName=n0 CPUTot=4 CPUEfctv=4'; echo 'NodeName=n1 CPUTot=8 CPUEfctv=6'"),
        ("sbatch", "exit 1"),
    ):
        (checkout / name).write_text(f"#!/bin/sh\n{text}\n")
        (checkout / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}:/usr/bin:/bin")
    given = ["--dry-run", "--", *ARGUMENTS]
    assert main(["launch", "--partition=gpu", *given]) == 0
    assert " --gres=gpu:4 " in capsys.readouterr().out
    assert main(["launch", "--partition=gup", "--gpus=4", *given]) == 1
    assert "found only the partitions ['gpu', 'main*']" in capsys.readouterr().err


def test_make_renders_on_this_machine_unless_nodes_is_set(root):
    def dry_run(*words):
        command = ["make", "-n", "-o", ".venv-render/ready", "render-shards", "OUT=data/mine", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    assert "data_tools render --assets='data_tools/demo_assets' --out='data/mine' --views='16' " in re.sub(
        " +", " ", dry_run()
    )
    assert "data_tools launch --nodes='8' --partition='gpu' --dry-run -- --assets=" in re.sub(
        " +", " ", dry_run("NODES=8", "PARTITION=gpu", "DRY_RUN=1")
    )
