"""``lrm <command>``: one table of commands, each imported when it is used."""

import importlib
import signal
import sys

from lrm_pl.apps.broken_pipes import outlive_readers
from lrm_pl.paths import escape_names

#: command -> (module:function, what it does)
COMMANDS = {
    "fit": ("lrm_pl.cli.lightning_cli:main", "train a model: lrm fit -c configs/experiment/demo.yaml"),
    "validate": (
        "lrm_pl.cli.lightning_cli:main",
        "measure a checkpoint: lrm validate -c RUN/config.yaml --ckpt_path X",
    ),
    "test": ("lrm_pl.cli.lightning_cli:main", "as validate, on all objects"),
    "predict": (
        "lrm_pl.cli.lightning_cli:main",
        "reconstruct a data set's held-out objects: lrm predict -c RUN/config.yaml --ckpt_path RUN",
    ),
    "infer": (
        "lrm_pl.apps.infer:main",
        "turn a photo into a mesh, an orbit and a record: lrm infer photo.png --ckpt RUN",
    ),
    "evaluate": (
        "lrm_pl.apps.evaluate:main",
        "measure a trained network under a protocol: lrm evaluate --ckpt RUN --data SHARDS --protocol lrm",
    ),
    "demo": ("lrm_pl.apps.demo:main", "show a page that turns photos into meshes: lrm demo --ckpt RUN"),
    "view": (
        "lrm_pl.apps.view:main",
        "fly around what a run reconstructs, also while it trains: lrm view RUN",
    ),
    "serve": ("lrm_pl.apps.serve:main", "answer images with meshes over HTTP: lrm serve --ckpt RUN"),
    "export": (
        "lrm_pl.apps.export:main",
        "turn a checkpoint into config.yaml + model.safetensors: lrm export RUN OUT",
    ),
    "convert": (
        "lrm_pl.apps.convert:main",
        "turn weights of OpenLRM or TripoSR into such a folder: lrm convert --from triposr model.ckpt OUT",
    ),
    "estimate": (
        "lrm_pl.apps.estimate:main",
        "say what a run costs, before it is started: lrm estimate CONFIG --gpus 128 --gpu a100-40g",
    ),
    "launch": (
        "lrm_pl.cluster.launch:main",
        "start a fit on several processes: under Slurm, or with torchrun",
    ),
    "doctor": ("lrm_pl.cluster.doctor:main", "check what a run needs, on every node"),
}


def main() -> None:
    """Dispatch to the command named first on the command line."""
    outlive_readers()
    escape_names()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        sys.stdout.write(
            "usage: lrm COMMAND ...\n\n" + "\n".join(lines) + "\n\n`lrm COMMAND --help` says more.\n"
        )
        raise SystemExit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        sys.stderr.write(
            f"lrm: expected one of {', '.join(COMMANDS)}, but found {arguments[0]!r}; try lrm --help\n"
        )
        raise SystemExit(2)
    module, function = COMMANDS[arguments[0]][0].split(":")
    try:
        getattr(importlib.import_module(module), function)()
    except KeyboardInterrupt:  # Ctrl-C before the command listens for it, or in the middle of its work
        sys.stderr.write("\nlrm: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
