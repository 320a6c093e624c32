"""Entry point of ``lrm COMMAND``, which imports the module of a command only when the command is run."""

import importlib
import signal
import sys

from lrm_pl.apps.broken_pipes import ignore_broken_pipes
from lrm_pl.paths import escape_names

#: Help texts of the commands.
COMMANDS = {
    "fit": "train a model: lrm fit -c configs/experiment/demo.yaml",
    "validate": "measure a checkpoint: lrm validate -c RUN/config.yaml --ckpt_path RUN",
    "test": "measure a checkpoint on all objects",
    "predict": "reconstruct held-out objects: lrm predict -c RUN/config.yaml --ckpt_path RUN",
    "infer": "reconstruct photos: lrm infer photo.png --ckpt RUN",
    "evaluate": "evaluate a model under a protocol: lrm evaluate --ckpt RUN --data SHARDS --protocol lrm",
    "demo": "web page that turns photos into meshes: lrm demo --ckpt RUN",
    "view": "web viewer of a run, also during training: lrm view RUN",
    "serve": "HTTP server that turns images into meshes: lrm serve --ckpt RUN",
    "export": "export a checkpoint to config.yaml and model.safetensors: lrm export RUN OUT",
    "convert": "convert weights of OpenLRM or TripoSR: lrm convert --from triposr model.ckpt OUT",
    "estimate": "estimate the memory and time of a run: lrm estimate CONFIG --gpus 128 --gpu a100-40g",
    "launch": "start a run on several processes, with Slurm or torchrun",
    "doctor": "check the requirements of a run on every node",
}

#: Modules of commands that are not in ``lrm_pl.apps``.
_MODULES = dict.fromkeys(("fit", "validate", "test", "predict"), "lrm_pl.cli.main") | {
    "launch": "lrm_pl.cluster.launch",
    "doctor": "lrm_pl.cluster.doctor",
}


def main() -> None:
    """Run the command given by the first argument."""
    ignore_broken_pipes()
    escape_names()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<8}  {text}\n" for name, text in COMMANDS.items())
        sys.stdout.write(f"usage: lrm COMMAND ...\n\n{lines}\nSee also `lrm COMMAND --help`.\n")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        sys.stderr.write(
            f"lrm: expected one of {', '.join(COMMANDS)}, but found {arguments[0]!r}. See lrm --help\n"
        )
        raise SystemExit(2)
    module = _MODULES.get(arguments[0], f"lrm_pl.apps.{arguments[0]}")
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:  # Ctrl-C before or during the command
        sys.stderr.write("\nlrm: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
