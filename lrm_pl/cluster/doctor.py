"""``lrm doctor``: check what a run needs, on every node, and say how to get what is missing (`make doctor`).

It takes the arguments of `lrm fit`. With ``--nodes`` it has Slurm start it on so many nodes; within a job,
``srun lrm doctor ...`` does the same. The nodes meet as the processes of a run would, and node 0 prints one table.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from lrm_pl.cluster import slurm
from lrm_pl.cluster.checks.table import rows, show
from lrm_pl.cluster.checks.versions import versions
from lrm_pl.cluster.launch import data_folders, processes_a_node
from lrm_pl.errors import InputError
from lrm_pl.training.processes import is_srun_task
from lrm_pl.weights.resolve import cache_folder


def start_on_nodes(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Return the srun command that starts one doctor a node.

    Raises:
        InputError: A value that cannot be used.
    """
    partition = slurm.chosen_partition(options.partition)
    account = slurm.checked("account", options.account)
    gpus = slurm.gpus_a_node(partition) if options.gpus is None else options.gpus
    processes = processes_a_node(gpus, options.processes)
    cpus = processes * slurm.cpus_a_process(partition, gpus, processes)
    python = "python" if options.container else sys.executable
    data = [] if options.data is None else [f"--data.folder={options.data}"]
    folders = data_folders(fit_arguments(options, arguments)) if options.container else []
    return [
        *("srun", "--job-name=lrm-doctor", "--time=30", f"--nodes={options.nodes}", "--ntasks-per-node=1"),
        f"--cpus-per-task={cpus}",
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={account}"] if account else []),
        *slurm.container_options(options.container, [*folders, "runs", cache_folder()]),
        *(python, "-m", "lrm_pl", "doctor", f"--gpus={gpus}", f"--processes={processes}", *data, *arguments),
    ]


def fit_arguments(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of the `lrm fit` that `lrm launch` would start."""
    nodes = os.environ["SLURM_STEP_NUM_NODES"] if is_srun_task() else options.nodes
    added = [] if nodes is None else [f"--trainer.num_nodes={nodes}"]
    added += [] if options.data is None else [f"--data.folder={options.data}"]
    if options.gpus is not None or options.processes is not None:
        processes = processes_a_node(options.gpus or 0, options.processes)
        added += [
            f"--trainer.devices={processes}",
            f"--trainer.accelerator={'gpu' if options.gpus else 'cpu'}",
        ]
    return [*arguments, *added]


def main(argv: list[str] | None = None) -> None:
    """Run the command line; the exit status is 1 if something is missing."""
    parser = argparse.ArgumentParser(
        prog="lrm doctor",
        description=__doc__,
        usage="%(prog)s [options] [arguments of lrm fit]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, help="machines, to be started by Slurm")
    add("--gpus", type=int, help="GPUs a machine; 0 means CPUs")
    add("--processes", type=int, help="processes a machine where no GPU is used")
    add("--partition", default="", help="Slurm's partition")
    add("--account", default="", help="Slurm's account")
    add("--container", default="", help="image to look into (pyxis)")
    add("--data.folder", dest="data", help="folder of the shards")
    options, arguments = parser.parse_known_args(sys.argv[2:] if argv is None else argv)
    in_step = is_srun_task()
    if in_step and os.environ["SLURM_LOCALID"] != "0":
        return  # one a node is enough
    try:
        if options.nodes is not None and not in_step and slurm.available():
            command = start_on_nodes(options, arguments)
            print(slurm.quoted(command), flush=True)
            os.execvp(command[0], command)
        arguments = fit_arguments(options, arguments)
    except InputError as error:
        sys.exit(f"lrm: {error}")
    found = versions()
    if any(finding.verdict == "missing" for finding in found):
        show(rows({"": found}))
        sys.exit(1)
    # Not before: these load torch and lightning, and here is where it is known that they are there.
    from lrm_pl.cluster.checks.rounds import examine

    try:
        table = examine(arguments, found)
    except InputError as error:
        sys.exit(f"lrm: {error}")
    alone = any(row.check == "rendezvous" and row.verdict != "ok" for row in table)
    if in_step and os.environ["SLURM_NODEID"] != "0" and not alone:
        return  # node 0 shows what all have found
    if not show(table):
        sys.exit(1)
    print("Nothing is missing: make train, with the same variables")
    sys.exit(0)
