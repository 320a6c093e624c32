"""Arguments and config layers of ``lrm fit``, such as custom classes and the list of callbacks."""

import argparse
import enum
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import Namespace, set_loader
from lightning.pytorch.callbacks import ProgressBar

from lrm_pl.cli.unique_keys import load_yaml
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local
from lrm_pl.training.run_folder import find_run_folder

#: The first config layer of every run.
BASE = Path(__file__).with_name("base.yaml")

#: Options of the argument parser. The parser mode resolves ${...} after all layers are merged.
PARSER_OPTIONS = {"parser_mode": "omegaconf+", "default_config_files": [str(BASE)], "allow_abbrev": False}
set_loader("omegaconf+", load_yaml, (yaml.YAMLError,))

#: Maps each option that names a custom class to the name of the base class, which is used in help texts.
OWN_CLASSES = {"model_class": "LRMModule", "data_class": "ShardDataModule"}


def own_classes(arguments: list[str]) -> dict[str, str | None]:
    """Return the values of ``--model_class`` and ``--data_class`` from the command line and the config files.

    The values are read before the parser is created because the parser is built from the constructors of these classes.

    Raises:
        InputError: A class is given as ``class_path``, as in LightningCLI's subclass mode.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in OWN_CLASSES:
        parser.add_argument(f"--{name}")
    options, _ = parser.parse_known_args(arguments)
    names = dict.fromkeys(OWN_CLASSES)
    for argument in arguments:
        if match := re.match(r"--(model|data)\.class_path(=|$)", argument):
            raise InputError(
                expected=f"--{match[1]}_class to name a class of your own",
                found=f"--{match[1]}.class_path",
                remedy=f"use --{match[1]}_class, with its arguments as --{match[1]}.NAME",
            )
    for path in options.config:
        try:
            layer = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            continue  # the parser reports the error
        layer = layer if isinstance(layer, dict) else {}
        names |= {name: layer[name] for name in OWN_CLASSES if name in layer}
        for section in ("model", "data"):
            if isinstance(layer.get(section), dict) and "class_path" in layer[section]:
                raise InputError(
                    subject=path,
                    expected=f"constructor arguments in the section {section}",
                    found="class_path",
                    remedy=(
                        f"name the class at the top level, {section}_class: {layer[section]['class_path']}, and move "
                        f"its init_args directly into {section}"
                    ),
                )
    return names | {name: value for name, value in vars(options).items() if name in OWN_CLASSES and value}


def load_class(option: str, name: str | None, base: type) -> type:
    """Import the class that an option names, or return ``base`` if the option is not set.

    Raises:
        InputError: The class cannot be imported or is not a subclass of ``base``.
    """
    if name is None:
        return base
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            expected=f"--{option} to name an importable class",
            found=f"{name} ({error})",
            remedy="set PYTHONPATH=. for modules in the working folder",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(expected=f"--{option} to name a subclass of {base.__name__}", found=name)
    return found


def run_config_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments ``-c config.yaml`` for the run that contains ``--ckpt_path``.

    The list is empty if the arguments already include a config file, or if no run contains the path.

    Raises:
        InputError: ``--ckpt_path`` does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path")
    options, _ = parser.parse_known_args(arguments)
    path = options.ckpt_path
    if path and is_local(path) and not Path(path).expanduser().exists():
        raise InputError(
            expected=f"a checkpoint or a run at {path}", found="nothing", remedy="correct --ckpt_path"
        )
    run = None if options.config or path is None else find_run_folder(path)
    return [] if run is None else ["-c", str(run / "config.yaml")]


def plain_strings(config: Any) -> Any:  # noqa: ANN401 - a namespace holds anything
    """Replace string enum members, such as the defaults of Lightning's Timer, with plain strings for YAML."""
    if isinstance(config, Namespace):
        for name, value in vars(config).items():
            config[name] = plain_strings(value)
    elif isinstance(config, list):
        return [plain_strings(value) for value in config]
    elif isinstance(config, str) and isinstance(config, enum.Enum):
        return config.value
    return config


def reject_empty_sections(config: Namespace, defaults: Namespace, prefix: str = "") -> None:
    """Reject config sections that are null, for example because all lines of a section are commented out.

    Raises:
        InputError: A section is null, which would discard the settings of earlier config files.
    """
    for name, default in vars(defaults).items():
        if not isinstance(default, Namespace) or "class_path" in default:
            continue
        if config.get(name) is None:
            raise InputError(
                expected=f"settings in the section {prefix}{name}",
                found="an empty section, which would discard the settings of earlier config files",
                remedy="add settings to it, or remove its line",
            )
        reject_empty_sections(config[name], default, f"{prefix}{name}.")


def merge_callbacks(
    configured: list[Namespace], defaults: list[Namespace], *, progress_bar: bool = True
) -> list[Namespace]:
    """Append the callbacks of a config to the callbacks of ``base.yaml``.

    A default callback is replaced by a configured callback of the same class or of a subclass. The default progress bar
    is replaced by any configured progress bar. If the config contains two callbacks of a default callback's class, for
    example after ``callbacks+:``, the last one is used.

    Args:
        configured: ``trainer.callbacks`` of the config.
        defaults: ``trainer.callbacks`` of ``base.yaml``.
        progress_bar: Whether to include a progress bar.
    """
    both = [*defaults, *configured]
    classes = [resolve_name(callback.class_path) for callback in both]
    default_classes = set(classes[: len(defaults)])

    def is_replaced(index: int) -> bool:
        cls = classes[index]
        base = ProgressBar if issubclass(cls, ProgressBar) else cls
        return cls in default_classes and any(issubclass(later, base) for later in classes[index + 1 :])

    kept = [index for index in range(len(both)) if not is_replaced(index)]
    return [both[i] for i in kept if progress_bar or not issubclass(classes[i], ProgressBar)]
