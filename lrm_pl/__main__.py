"""Entry point of ``lrm COMMAND``, which imports the module of a command only when the command is run."""

import importlib
import signal
import sys

from lrm_pl.apps.broken_pipes import ignore_broken_pipes
from lrm_pl.paths import escape_names

_CLI = "lrm_pl.cli.main:main"

#: Maps the name of each command to ``module:function`` and a help text.
COMMANDS = {
    "fit": (_CLI, "train a model: lrm fit -c configs/experiment/demo.yaml"),
    "validate": (_CLI, "measure a checkpoint: lrm validate -c RUN/config.yaml --ckpt_path RUN"),
    "test": (_CLI, "measure a checkpoint on all objects"),
    "predict": (_CLI, "reconstruct held-out objects: lrm predict -c RUN/config.yaml --ckpt_path RUN"),
    "infer": ("lrm_pl.apps.infer:main", "reconstruct photos: lrm infer photo.png --ckpt RUN"),
    "evaluate": (
        "lrm_pl.apps.evaluate:main",
        "evaluate a model under a protocol: lrm evaluate --ckpt RUN --data SHARDS --protocol lrm",
    ),
    "demo": ("lrm_pl.apps.demo:main", "web page that turns photos into meshes: lrm demo --ckpt RUN"),
    "view": ("lrm_pl.apps.view:main", "web viewer of a run, also during training: lrm view RUN"),
    "serve": ("lrm_pl.apps.serve:main", "HTTP server that turns images into meshes: lrm serve --ckpt RUN"),
    "export": (
        "lrm_pl.apps.export:main",
        "export a checkpoint to config.yaml and model.safetensors: lrm export RUN OUT",
    ),
    "convert": (
        "lrm_pl.apps.convert:main",
        "convert weights of OpenLRM or TripoSR: lrm convert --from triposr model.ckpt OUT",
    ),
    "estimate": (
        "lrm_pl.apps.estimate:main",
        "estimate the memory and time of a run: lrm estimate CONFIG --gpus 128 --gpu a100-40g",
    ),
    "launch": ("lrm_pl.cluster.launch:main", "start a run on several processes, with Slurm or torchrun"),
    "doctor": ("lrm_pl.cluster.doctor:main", "check the requirements of a run on every node"),
}


def main() -> None:
    """Run the command given by the first argument."""
    ignore_broken_pipes()
    escape_names()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        sys.stdout.write(
            "usage: lrm COMMAND ...\n\n" + "\n".join(lines) + "\n\nSee also `lrm COMMAND --help`.\n"
        )
        raise SystemExit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        sys.stderr.write(
            f"lrm: expected one of {', '.join(COMMANDS)}, but found {arguments[0]!r}. See lrm --help\n"
        )
        raise SystemExit(2)
    module, function = COMMANDS[arguments[0]][0].split(":")
    try:
        getattr(importlib.import_module(module), function)()
    except KeyboardInterrupt:  # Ctrl-C before or during the command
        sys.stderr.write("\nlrm: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
