"""Turn a file of weights that others published into a folder of ours."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import model_card
from lrm_pl.inference.model_folder import build_network, write_pretrained
from lrm_pl.weights.key_map import Conversion, UnseenNumbers
from lrm_pl.weights.openlrm import convert_openlrm
from lrm_pl.weights.tensor_files import read_tensor_file
from lrm_pl.weights.triposr import convert_triposr

CONVERTERS = {"openlrm": convert_openlrm, "triposr": convert_triposr}

#: How their own programs show an object to the network, and where they cut its surface.
SETUPS = {
    # openlrm/utils/preprocess.py (a border of a fifth) and configs/infer-*.yaml
    "openlrm": InputFraming(distance=2.0, fov_deg=67.38, foreground=0.8, threshold=3.0),
    # run.py; our scene unit is 0.87 of theirs, and their cameras stand 1.9 of theirs away
    "triposr": InputFraming(1.9 / 0.87, 40.0, foreground=0.85, background=0.5, threshold=25.0),
}

#: What the published weights may be used for.
LICENSES = {
    "openlrm": "OpenLRM's published weights are CC BY-NC 4.0.",
    "triposr": "TripoSR's published weights are MIT.",
}


def convert(source: str, weights: Path, out: Path, unseen: UnseenNumbers) -> Conversion:
    """Convert a file of weights into a new folder, after its network was built and has taken them.

    Args:
        source: "openlrm" or "triposr".
        weights: The file.
        out: The folder, which must not exist; it appears when it is whole.
        unseen: What tensors do not show.

    Raises:
        InputError: The weights are not of that architecture, or OUT is there.
    """
    require_no_folder(out)
    if not weights.is_file():
        raise InputError(expected=f"weights at {weights}", found="no file", remedy="correct the path")
    conversion = CONVERTERS[source](read_tensor_file(weights, source), unseen)
    network, _ = build_network(conversion.model)
    network.load_state_dict(conversion.weights, strict=True)
    origin = f"Converted from {weights.name} ({source})."
    card = model_card(out.name, f"{origin} {LICENSES[source]}", conversion.model, {})
    write_pretrained(out, conversion.model, conversion.weights, origin, SETUPS[source], card)
    return conversion


def print_report(conversion: Conversion) -> None:
    """Print what became of each of their keys."""
    table = Table("theirs", "ours", "shape", "")
    for record in conversion.report:
        shape = " x ".join(map(str, record.shape))
        table.add_row("\n".join(record.theirs), record.ours or "left out", shape, record.how)
    # Wide enough for any key: a report is also read in files.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
