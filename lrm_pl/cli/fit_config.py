"""Parsing of the config of ``lrm fit`` without building the trainer."""

import argparse
from typing import cast

import torch
from jsonargparse import Namespace

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.module import LRMModule

#: Replacements for trainer settings that open files or require the machine of the run.
_NO_TRAINER = {
    "callbacks": None,
    "strategy": "auto",
    "logger": False,
    "plugins": None,
    "accelerator": "cpu",
    "devices": 1,
}


class _ParseOnlyCLI(LRMCLI):
    """Command line of ``lrm fit`` that parses arguments but instantiates nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing, because only the config is required."""

    def _set_seed(self) -> None:
        """Do nothing, so that the random seeds do not change."""


def parse_fit(arguments: list[str]) -> Namespace:
    """Parse the arguments of ``lrm fit``.

    Raises:
        InputError: ``lrm fit`` would reject the arguments.
    """
    return _parse(arguments).config


def build_meta_model(arguments: list[str]) -> tuple[Namespace, LRMModule, ShardDataModule]:
    """Parse the arguments of ``lrm fit``, and build the data module and, on the meta device, the model.

    Raises:
        InputError: ``lrm fit`` would reject the arguments.
    """
    cli = _parse(arguments)
    config = cli.config.clone()
    for name, value in _NO_TRAINER.items():
        config[f"trainer.{name}"] = value
    with torch.device("meta"):
        built = cli.parser.instantiate_classes(config)
    return cli.config, cast(LRMModule, built["model"]), cast(ShardDataModule, built["data"])


def _parse(arguments: list[str]) -> _ParseOnlyCLI:
    try:
        return _ParseOnlyCLI("fit", arguments, records=False, exits=False)
    except argparse.ArgumentError as error:
        raise InputError(
            expected="valid arguments of `lrm fit`",
            found=error,
            remedy="correct the arguments; see `lrm fit --help`",
        ) from error
