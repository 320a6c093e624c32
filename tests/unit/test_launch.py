"""Launching on several processes: the commands of sbatch and torchrun, and the job script."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lrm_pl.__main__ import main as lrm
from lrm_pl.cluster import slurm
from lrm_pl.cluster.launch import main, node_command
from tests.builders import a_launch, run_job


def test_arguments_are_passed_unchanged_through_the_job_script(checkout):
    """srun is replaced by printf, which prints each argument."""
    nasty = ("$(touch pwned)", "`touch pwned`", "a b", "'; touch pwned; '", '"', "${HOME}", "*", "$$", "\\")
    srun = "srun() { printf '%s\\n' \"$@\"; }\n"
    launch = a_launch(arguments=nasty, data="data/$(touch pwned)")
    with run_job(checkout, srun, launch, cache=Path("/x; touch pwned")) as job:
        output = job.stdout.read().splitlines()
    assert tuple(output[-len(nasty) :]) == nasty
    assert "--cpus-per-task=6" in output
    assert "data/$(touch pwned)" in output
    assert not (checkout / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["a b", "../up", "a%j", "x\n#SBATCH --uid=0", "-x", "$(id)", "bash", "interactive"]
)
def test_an_invalid_name_is_rejected(no_slurm, name):
    with pytest.raises(SystemExit, match="NAME"):
        main(["--gpus", "0", "-c", "mine.yaml", f"--name={name}", "--dry-run"])


def test_several_nodes_without_slurm_print_one_command_with_a_placeholder_for_the_rank(no_slurm, capsys):
    main(
        [
            "--nodes=8",
            "--gpus=0",
            "-c",
            "mine.yaml",
            "--name=x",
            "--master=first:1234",
            "--",
            "--trainer.max_steps",
            "5",
        ]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == 1
    assert shlex.split(lines[0]) == [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "8", "--node-rank", "NODE_RANK"),
        *("--master-addr", "first", "--master-port", "1234", "--nproc-per-node", "1", "-m", "lrm_pl", "fit"),
        *(
            "-c",
            "configs/trainer/ddp.yaml",
            "-c",
            "mine.yaml",
            "--trainer.num_nodes",
            "8",
            "--trainer.devices",
            "1",
        ),
        *("--trainer.accelerator", "cpu", "--run.folder", "runs/x"),
        *("--trainer.max_steps", "5"),
    ]


@pytest.mark.parametrize("options", [["--nodes=8"], ["--partition=gpu"]])
def test_a_dry_run_prints_the_sbatch_command_without_slurm(no_slurm, capsys, options):
    main([*options, "--gpus=8", "-c", "mine.yaml", "--dry-run"])
    output = capsys.readouterr().out
    assert " --gres=gpu:8 " in output
    assert " --cpus-per-task=CPUS " in output
    assert "This machine has no `sbatch`, so CPUS is a placeholder" in output
    assert not Path("runs").exists()


def test_cpus_that_are_reserved_for_the_system_are_not_requested(checkout, monkeypatch):
    programs = {
        "sinfo": "echo 'gpu*|32|n0|gpu:4'; echo 'gpu*|32|n1|gpu:4'",
        "scontrol": "echo 'NodeName=n0 Arch=x86_64 CPUEfctv=28 CPUTot=32'; echo 'NodeName=n1 X=1'",
    }
    for name, text in programs.items():
        (checkout / name).write_text(f"#!/bin/sh\n{text}\n")
        (checkout / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}:{os.environ['PATH']}")
    assert [shape.cpus for shape in slurm.node_shapes("gpu")] == [28, 32]
    assert slurm.cpus_per_process("gpu", gpus=4, processes=4) == 7


@pytest.mark.parametrize("named", ["option", "variable"])
def test_the_number_of_gpus_is_read_from_a_hidden_partition_or_the_partition_in_the_environment(
    checkout, monkeypatch, capsys, named
):
    programs = {
        "sinfo": "echo 'cpu*|4|n0|(null)'; case $1 in --all) echo 'gpu|8|n1|gpu:4' ;; esac",
        "scontrol": "exit 0",
        "sbatch": "exit 1",
    }
    for name, text in programs.items():
        (checkout / name).write_text(f"#!/bin/sh\n{text}\n")
        (checkout / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}:{os.environ['PATH']}")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    if named == "variable":
        monkeypatch.setenv("SBATCH_PARTITION", "gpu")
        main(["--nodes=2", "--partition=cpu", "-c", "mine.yaml", "--dry-run"])
        assert " --partition=cpu " in capsys.readouterr().out, "an option overrides the variable"
    main(["--nodes=2", *(["--partition=gpu"] if named == "option" else []), "-c", "mine.yaml", "--dry-run"])
    output = capsys.readouterr().out
    assert " --gres=gpu:4 --partition=gpu " in output


def test_two_nodes_without_slurm_and_master_are_an_error_with_a_remedy(no_slurm, capsys):
    with pytest.raises(SystemExit, match=r"expected Slurm .* found no `sbatch` on PATH. Run this"):
        main(["--nodes=2", "--gpus=0", "-c", "mine.yaml"])
    assert capsys.readouterr().out.count("--master-addr FIRST_NODE") == 1


def test_master_does_not_use_slurm(checkout, monkeypatch, capsys):
    """Slurm is installed, but its controller does not respond."""
    for name in ("sbatch", "sinfo"):
        program = checkout / name
        program.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}:{os.environ['PATH']}")
    given = ["--gpus=0", "--processes=2", "-c", "mine.yaml", "--dry-run"]
    with pytest.raises(
        SystemExit, match=r"Unable to contact slurm controller. Fix .*MASTER=localhost with GPUS="
    ):
        main(given)
    main([*given, "--master=localhost"])
    assert "--nproc-per-node 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="GPUS is not set, but MASTER"):
        main(["--master=localhost", "-c", "mine.yaml", "--dry-run"])


@pytest.mark.parametrize(
    ("arguments", "strategy"),
    [
        (["--gpus=0"], "cpu"),
        (["--gpus=1"], "gpu"),
        (["--gpus=2"], "ddp"),
        (["--gpus=0", "--processes=2"], "ddp"),
    ],
)
def test_a_single_node_is_started_locally_with_the_default_strategy(no_slurm, capsys, arguments, strategy):
    main([*arguments, "-c", "mine.yaml", "--dry-run"])
    output = capsys.readouterr().out
    assert "torch.distributed.run --standalone" in output
    assert f" -c configs/trainer/{strategy}.yaml -c mine.yaml --trainer" in output, (
        "the config overrides the default strategy"
    )
    assert not Path("runs").exists(), "a dry run writes nothing"


def test_a_given_strategy_and_data_folder_override_the_config(no_slurm, capsys):
    main(["--gpus=2", "--strategy=gpu", "--data=data/mine", "-c", "mine.yaml", "--dry-run"])
    output = capsys.readouterr().out
    assert " fit -c mine.yaml -c configs/trainer/gpu.yaml --trainer" in output
    assert " --data.folder data/mine " in output
    main(["--gpus=2", "-c", "mine.yaml", "--dry-run"])
    assert "--data.folder" not in capsys.readouterr().out


def test_processes_without_gpus_run_on_cpus(no_slurm, capsys):
    main(["--processes=2", "-c", "mine.yaml", "--dry-run"])
    assert "--trainer.devices 2 --trainer.accelerator cpu" in capsys.readouterr().out


def test_more_gpus_than_available_are_rejected_before_the_start(no_slurm):
    with pytest.raises(SystemExit, match="expected 4 GPUs on this machine, but found 0 that PyTorch can use"):
        main(["--gpus=4", "-c", "mine.yaml"])


@pytest.fixture
def group(checkout, root):
    """Return a function that launches two processes of a program in place of lrm_pl."""

    def start(program):
        (checkout / "lrm_pl.py").write_text("import os, signal, sys, time\n" + program)
        launcher = "import sys; sys.path.pop(0); sys.path.insert(0, sys.argv[1])\n"
        launcher += "from lrm_pl.training.processes import launch_processes; launch_processes(2, ['fit'])"
        return subprocess.Popen(
            [sys.executable, "-c", launcher, str(root)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize(
    ("ends", "status", "output"),
    [
        pytest.param("sys.exit(0)", 0, "", marks=pytest.mark.soak),
        ("sys.exit(75 if os.environ['RANK'] == '1' else 0)", 75, ""),
        (
            "os.write(2, b'lrm: expected this, but found that\\n'); sys.exit(1)",
            1,
            "lrm: expected this, but found that\n",
        ),
        ("os.kill(os.getpid(), 9)", 137, "lrm: process 0 of 2 was terminated by signal 9\n"),
    ],
)
def test_the_launcher_prints_no_traceback_after_the_messages_of_its_processes(
    group, ends, status, output, tmp_path, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = group(ends)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == status, printed
    assert not list((tmp_path / "temporary").iterdir()), "no temporary files remain"
    # The launcher may stop the other process before that process prints its message.
    assert set(printed.replace("process 1", "process 0").splitlines()) == set(output.splitlines())


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_is_forwarded_to_all_processes_without_a_traceback(group, number):
    process = group(
        "def stop(number, frame):\n    time.sleep(1)\n    os.write(1, b'kept\\n')\n    sys.exit(75)\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n    signal.signal(number, stop)\n"
        "os.write(1, b'up\\n')\n"
        "time.sleep(60)"
    )
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    printed, _ = process.communicate(timeout=100)
    assert printed.splitlines() == ["kept", "kept"]
    assert process.returncode == 128 + number


def test_the_default_name_contains_the_experiment_and_the_time(no_slurm, capsys):
    main(["--gpus=0", "-c", "mine.yaml", "--dry-run"])
    assert re.search(r"--run.folder runs/mine-\d{8}-\d{6}-\d{6}\n", capsys.readouterr().out)


def test_two_runs_launched_in_the_same_second_have_different_folders(no_slurm, capsys):
    for _ in range(2):
        main(["--gpus=0", "-c", "mine.yaml", "--dry-run"])
    first, second = re.findall(r"--run.folder (\S+)", capsys.readouterr().out)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus=2", "--processes=3"], "expected one process per GPU, but found PROCESSES=3 with GPUS=2"),
        (["--gpus=0", "--processes=0"], "PROCESSES=0"),
        (["--gpus=-1"], "expected GPUS of at least 0, but found -1"),
        (["--nodes=0", "--gpus=1"], "expected NODES of at least 1, but found 0"),
        (["--nodes=2"], "GPUS is not set. Use GPUS=8"),
        (
            ["--gpus=2", "--strategy=dpp"],
            r"expected STRATEGY to be one of \['cpu', 'ddp', 'gpu'\].*, but found 'dpp'",
        ),
        (["--gpus=2", "--strategy=../../x"], "expected STRATEGY to be one of"),
        (["--gpus=2", "-c", "none.yaml"], "expected a config file at none.yaml, but found none"),
        (["--nodes=2", "--gpus=0", "--master=first;id"], "for MASTER, but found 'first;id'"),
    ],
)
def test_invalid_options_are_rejected(no_slurm, arguments, message):
    with pytest.raises(SystemExit, match=message):
        lrm_launch([*arguments, "-c", "mine.yaml"])


def lrm_launch(arguments):
    """Run the command through `lrm`."""
    before, sys.argv = sys.argv, ["lrm", "launch", *arguments]
    try:
        lrm()
    finally:
        sys.argv = before


def test_torchrun_runs_the_printed_command(checkout, root):
    """Run the printed command with a short program in place of lrm_pl."""
    (checkout / "lrm_pl.py").write_text(
        "import os\nprint(f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\")\n"
    )
    command = [sys.executable, "-P", "-m", "lrm_pl", "launch", "--gpus=0", "--processes=2", "-c", "mine.yaml"]
    bare = {"PATH": str(checkout), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [*command, "--dry-run"], env=bare, capture_output=True, text=True, check=True
    ).stdout
    line = shlex.split(shown.splitlines()[0])
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert sorted(re.findall(r"rank \d of \d", done.stdout)) == ["rank 0 of 2", "rank 1 of 2"], done.stderr


def test_the_printed_commands_of_two_nodes_rendezvous(checkout, root):
    """Run both commands on this machine with a program that sums the ranks in place of lrm_pl."""
    program = "import torch.distributed as d, torch\nd.init_process_group('gloo')\nx = torch.tensor(d.get_rank() + 1)\n"
    program += "d.all_reduce(x)\nprint(f'sum {x.item()}')\nd.destroy_process_group()\n"
    (checkout / "lrm_pl.py").write_text(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = [node_command(a_launch(gpus=0, processes=1), f"127.0.0.1:{port}", rank) for rank in range(2)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            shlex.split(line), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in lines
    ]
    try:
        output = [node.communicate(timeout=100)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert all("sum 3" in text for text in output), output
