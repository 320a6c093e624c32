"""The config of a run as `lrm fit` would read it, without making anything of it, or only its model, without numbers."""

import argparse
from typing import cast

import torch
from jsonargparse import Namespace

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.module import LRMModule

#: What of a trainer could not be made here: another machine's devices, loggers that open files.
_NO_TRAINER = {
    "callbacks": None,
    "strategy": "auto",
    "logger": False,
    "plugins": None,
    "accelerator": "cpu",
    "devices": 1,
}


class _ParsedOnly(LRMCLI):
    """The command line of `lrm fit` that stops once everything is parsed."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _set_seed(self) -> None:
        """Seed nothing, and say nothing of it."""


def parse_fit(arguments: list[str]) -> Namespace:
    """Read the arguments of `lrm fit`.

    Raises:
        InputError: `lrm fit` would refuse them.
    """
    return _parsed(arguments).config


def model_without_numbers(arguments: list[str]) -> tuple[Namespace, LRMModule, ShardDataModule]:
    """Read the arguments of `lrm fit`; also make its model on the meta device, and its data module.

    Raises:
        InputError: `lrm fit` would refuse them.
    """
    parsed = _parsed(arguments)
    config = parsed.config
    bare = config.clone()
    for name, value in _NO_TRAINER.items():
        bare[f"trainer.{name}"] = value
    with torch.device("meta"):
        made = parsed.parser.instantiate_classes(bare)
    return config, cast(LRMModule, made["model"]), cast(ShardDataModule, made["data"])


def _parsed(arguments: list[str]) -> _ParsedOnly:
    try:
        return _ParsedOnly("fit", arguments, records=False, exits=False)
    except argparse.ArgumentError as error:
        raise InputError(
            expected="arguments that `lrm fit` takes",
            found=error,
            remedy="correct them, see `lrm fit --help`",
        ) from error
