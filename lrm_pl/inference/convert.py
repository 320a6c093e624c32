"""Conversion of published weights of OpenLRM or TripoSR to a model folder."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import new_folder, require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import model_card
from lrm_pl.inference.model_folder import build_network, write_model_folder
from lrm_pl.weights.key_map import Conversion, Hyperparameters, read_tensor_file
from lrm_pl.weights.openlrm import convert_openlrm
from lrm_pl.weights.triposr import convert_triposr

CONVERTERS = {"openlrm": convert_openlrm, "triposr": convert_triposr}

#: Input framing and density threshold of the original inference programs, by source.
FRAMINGS = {
    # The values are from openlrm/utils/preprocess.py and configs/infer-*.yaml.
    "openlrm": InputFraming(distance=2.0, fov_deg=67.38, foreground=0.8, threshold=3.0),
    # The values are from run.py, where the distance is 1.9. One scene unit corresponds to 0.87 units of TripoSR.
    "triposr": InputFraming(1.9 / 0.87, 40.0, foreground=0.85, background=0.5, threshold=25.0),
}

#: Licenses of the published weights, by source.
LICENSES = {
    "openlrm": "OpenLRM's published weights are CC BY-NC 4.0.",
    "triposr": "TripoSR's published weights are MIT.",
}


def convert(source: str, weights: Path, out: Path, hyperparameters: Hyperparameters) -> Conversion:
    """Convert a weight file to a new model folder.

    The folder is written only after the converted weights have been loaded strictly into the network.

    Args:
        source: Project that published the weights, "openlrm" or "triposr".
        weights: Path of the weight file.
        out: Path of the model folder, which must not exist.
        hyperparameters: Hyperparameters that cannot be determined from tensor shapes.

    Raises:
        InputError: The weight file does not exist, the weights do not match the architecture, or the folder exists.
    """
    require_no_folder(out)
    if not weights.is_file():
        raise InputError(expected=f"weights at {weights}", found="no file", remedy="correct the path")
    conversion = CONVERTERS[source](read_tensor_file(weights, source), hyperparameters)
    network, _ = build_network(conversion.model)
    network.load_state_dict(conversion.weights, strict=True)
    origin = f"Converted from {weights.name} ({source})."
    card = model_card(out.name, f"{origin} {LICENSES[source]}", conversion.model, {})
    with new_folder(out) as folder:
        write_model_folder(folder, conversion.model, conversion.weights, origin, FRAMINGS[source], card)
    return conversion


def print_report(conversion: Conversion) -> None:
    """Print a table of the source keys, the target keys, the shapes and the changes to the tensors."""
    table = Table("source key", "key", "shape", "change")
    for record in conversion.report:
        shape = " x ".join(map(str, record.shape))
        table.add_row("\n".join(record.sources), record.target or "unused", shape, record.change)
    # Redirected output has a fixed width so that keys are not truncated.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
