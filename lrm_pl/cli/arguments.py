"""Processing of the arguments and config files of ``lrm fit``, including custom classes and callbacks."""

import argparse
import contextlib
import enum
import os
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar

from lrm_pl.errors import InputError
from lrm_pl.storage import is_local
from lrm_pl.training.run_folder import find_run_folder

#: The first config layer of every run.
BASE = Path(__file__).with_name("base.yaml")

#: Options of the argument parser. The parser mode resolves ${...} after all layers are merged.
PARSER_OPTIONS = {"parser_mode": "omegaconf+", "default_config_files": [str(BASE)], "allow_abbrev": False}

#: Maps each option that names a custom class to the name of the base class, which is used in help texts.
OWN_CLASSES = {"model_class": "LRMModule", "data_class": "ShardDataModule"}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that raises an ``InputError`` if a mapping contains a key twice.

    Attributes:
        subject: Name of the loaded text in error messages.
    """

    subject: str

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Compose a mapping, and check that no key occurs twice."""
        node = super().compose_mapping_node(anchor)
        keys: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            first = keys.setdefault(key.value, key) if isinstance(key, yaml.ScalarNode) else key
            if first is not key:
                raise InputError(
                    subject=self.subject,
                    expected="each key once",
                    found=f"{key.value} on line {key.start_mark.line + 1} and on line {first.start_mark.line + 1}",
                    remedy="merge the two entries",
                )
        return node


def load_yaml(text: str, path: str | os.PathLike[str] = "") -> Any:  # noqa: ANN401 - any YAML value
    """Load YAML like jsonargparse, but reject duplicate keys.

    Args:
        text: The YAML text.
        path: Path of the file for error messages, or "" if it is unknown. jsonargparse does not pass the path of a file
            that contains a single section.

    Raises:
        InputError: A mapping contains a key twice.
    """
    loader = _UniqueKeyLoader(text)
    loader.subject = os.path.abspath(path) if path else "the file of a section, or an option"
    loader.get_single_node()
    return jsonargparse.get_loader("yaml")(text)


jsonargparse.set_loader("omegaconf+", load_yaml, (yaml.YAMLError,))

# Defaults of classes, such as Lightning's Timer, may be enum members, which PyYAML cannot write.
yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))


def peek(arguments: Sequence[str], *names: str) -> dict[str, Any]:
    """Return the values of ``--config`` and of other options before the parser of ``lrm fit`` is created.

    Args:
        arguments: Arguments of the command.
        names: Names of the other options. The value of an option that is not given is None.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for name in names:
        parser.add_argument(f"--{name}", dest=name)
    return vars(parser.parse_known_args(arguments)[0])


def own_classes(arguments: Sequence[str]) -> dict[str, str | None]:
    """Return the values of ``--model_class`` and ``--data_class`` from the command line and the config files.

    The values are read before the parser is created because the parser is built from the constructors of these classes.

    Raises:
        InputError: A class is given as ``class_path``, as in LightningCLI's subclass mode.
    """
    sections = ("model", "data")
    options = peek(arguments, *OWN_CLASSES, *(f"{section}.class_path" for section in sections))
    layers: dict[str, Any] = {}
    for path in options["config"]:
        with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError):  # the parser reports the error
            layers[path] = yaml.safe_load(Path(path).read_text())
    given = {name: value for name, value in options.items() if value}
    layers["command line"] = given | {
        section: {"class_path": given[f"{section}.class_path"]}
        for section in sections
        if f"{section}.class_path" in given
    }
    names: dict[str, str | None] = dict.fromkeys(OWN_CLASSES)
    for subject, layer in layers.items():
        if not isinstance(layer, dict):
            continue
        names |= {name: layer[name] for name in OWN_CLASSES if name in layer}
        for section in sections:
            if isinstance(layer.get(section), dict) and "class_path" in layer[section]:
                raise InputError(
                    subject=subject,
                    expected=f"constructor arguments in the section {section}",
                    found="class_path",
                    remedy=(
                        f"set {section}_class: {layer[section]['class_path']} at the top level of the config, and "
                        f"move the init_args directly into the section {section}"
                    ),
                )
    return names


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
            expected=f"an importable class for --{option}",
            found=f"{name} ({error})",
            remedy="set PYTHONPATH=. if the module is in the working folder",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(expected=f"a subclass of {base.__name__} for --{option}", found=name)
    return found


def run_config_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments ``-c config.yaml`` for the run that contains ``--ckpt_path``.

    The list is empty if the arguments already include a config file, or if no run contains the path.

    Raises:
        InputError: ``--ckpt_path`` does not exist.
    """
    options = peek(arguments, "ckpt_path")
    path = options["ckpt_path"]
    if path and is_local(path) and not Path(path).expanduser().exists():
        raise InputError(
            expected=f"a checkpoint or a run at {path}", found="nothing", remedy="correct --ckpt_path"
        )
    run = None if options["config"] or path is None else find_run_folder(path)
    return [] if run is None else ["-c", str(run / "config.yaml")]


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
                remedy="add settings to the section, or remove its line",
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
    both = [(callback, resolve_name(callback.class_path)) for callback in [*defaults, *configured]]
    default_classes = [cls for _, cls in both[: len(defaults)]]
    kept = []
    for number, (callback, cls) in enumerate(both, 1):
        is_bar = issubclass(cls, ProgressBar)
        replacement = ProgressBar if is_bar else cls
        is_replaced = cls in default_classes and any(issubclass(c, replacement) for _, c in both[number:])
        if not is_replaced and (progress_bar or not is_bar):
            kept.append(callback)
    return kept
