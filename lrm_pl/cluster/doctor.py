"""Check the requirements of a run on every node, and print what is missing (`make doctor`).

The arguments of `lrm fit` are accepted. With `--nodes`, Slurm runs the checks on several nodes. Inside a Slurm job, use
`srun lrm doctor ...` instead. The first node prints one table for all nodes.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from lrm_pl.cluster import slurm
from lrm_pl.cluster.checks.findings import print_table
from lrm_pl.cluster.checks.versions import versions
from lrm_pl.cluster.launch import add_process_options, data_folders, processes_per_node
from lrm_pl.errors import exit_on_error
from lrm_pl.paths import cache_folder
from lrm_pl.training.processes import is_srun_task


@exit_on_error
def main(argv: Sequence[str]) -> None:
    """Run ``lrm doctor``, which exits with status 1 if a requirement is missing."""
    parser = argparse.ArgumentParser(
        prog="lrm doctor",
        description=__doc__,
        usage="%(prog)s [options] [arguments of lrm fit]",
        allow_abbrev=False,
    )
    add_process_options(parser)
    parser.set_defaults(nodes=None)
    parser.add_argument("--data.folder", dest="data", help="folder of the shards")
    options, arguments = parser.parse_known_args(argv)
    in_step = is_srun_task()
    if in_step and os.environ["SLURM_LOCALID"] != "0":
        return  # only one process per node runs the checks
    if options.nodes is not None and not in_step and slurm.available():
        command = srun_command(options, arguments)
        print(slurm.quoted(command), flush=True)
        os.execvp(command[0], command)
    arguments = fit_arguments(options, arguments)
    rows = [("", finding) for finding in versions()]
    isolated = any(finding.missing for _, finding in rows)
    if not isolated:
        # Imported here because the module imports torch and lightning, which the checks above may report as missing.
        from lrm_pl.cluster.checks.nodes import run_checks

        rows = run_checks(arguments, [finding for _, finding in rows])
        isolated = any(finding.check == "rendezvous" and finding.missing for _, finding in rows)
    if in_step and os.environ["SLURM_NODEID"] != "0" and not isolated:
        return  # the first node prints the table
    if not print_table(rows):
        sys.exit(1)
    print("All requirements are met. Start the run with `make train` and the same variables.")


def srun_command(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Return the srun command that starts ``lrm doctor`` once per node.

    Raises:
        InputError: An option is invalid.
    """
    partition = options.partition
    gpus = slurm.gpus_per_node(partition) if options.gpus is None else options.gpus
    processes = processes_per_node(gpus, options.processes)
    cpus = processes * slurm.cpus_per_process(partition, gpus, processes)
    python = "python" if options.container else sys.executable
    data = [] if options.data is None else [f"--data.folder={options.data}"]
    folders = data_folders(fit_arguments(options, arguments)) if options.container else []
    return [
        *("srun", "--job-name=lrm-doctor", "--time=30", f"--nodes={options.nodes}", "--ntasks-per-node=1"),
        f"--cpus-per-task={cpus}",
        *([f"--gres=gpu:{gpus}"] if gpus else []),
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={options.account}"] if options.account else []),
        *slurm.container_options(options.container, [*folders, "runs", cache_folder()]),
        *(python, "-m", "lrm_pl", "doctor", f"--gpus={gpus}", f"--processes={processes}", *data, *arguments),
    ]


def fit_arguments(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that ``lrm launch`` would pass to ``lrm fit``."""
    nodes = os.environ["SLURM_STEP_NUM_NODES"] if is_srun_task() else options.nodes
    added = [] if nodes is None else [f"--trainer.num_nodes={nodes}"]
    added += [] if options.data is None else [f"--data.folder={options.data}"]
    if options.gpus is not None or options.processes is not None:
        processes = processes_per_node(options.gpus or 0, options.processes)
        added += [
            f"--trainer.devices={processes}",
            f"--trainer.accelerator={'gpu' if options.gpus else 'cpu'}",
        ]
    return [*arguments, *added]
