"""The folder of an evaluation: a record an object, so that it goes on where it was, whoever measured what.

OUT/settings.json      what is measured: protocol, weights, shards; another evaluation refuses the folder
OUT/objects/ID.json    the metrics of one object, model and baselines
OUT/objects/ID.png     its strip of images
OUT/objects/ID.npz     features of its images, where FID and KID are wanted
OUT/results.json, results.md, index.html    written last
"""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError

#: Where evaluations and comparisons go that were given no folder.
DEFAULT_FOLDER = Path("evaluation")

SETTINGS_NAME, OBJECTS_NAME, RESULTS_NAME = "settings.json", "objects", "results.json"

#: Settings that say where something was found; the hash beside them says what it is, wherever it lies.
_PLACES = {"network": ("source", "step"), "data": ("folder",)}


@dataclasses.dataclass(frozen=True)
class ObjectRecord:
    """What is kept of one object.

    Attributes:
        id: Its key.
        rows: "model" and the baselines -> metric -> figure.
        notes: What could not be measured, and why.
        bad: Why nothing was measured; empty where something was.
        files: Endings of the files that were kept beside the record.
    """

    id: str
    rows: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()
    bad: str = ""
    files: tuple[str, ...] = ()


def open_evaluation(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Create the folder of an evaluation, or check that it holds this evaluation; baselines may be added later.

    Returns:
        The settings that it was first claimed with: a network and shards may have moved, or been exported, since then.

    Raises:
        InputError: It is another one's.
    """
    path = folder / SETTINGS_NAME
    content = _text(settings)
    (folder / OBJECTS_NAME).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_atomically(path, content)
    first = read_json(path)
    if settings.get("baselines") and first.get("baselines") is False:
        first = {**first, "baselines": True}
        write_atomically(path, _text(first))
    expected, found = without_locations(json.loads(content)), without_locations(first)
    if different := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        name = sorted(different)[0]
        remedy = "say --baseline too, or choose" if different == ["baselines"] else "choose"
        raise InputError(
            subject=path,
            expected=f"{name} {expected.get(name)!r} as asked for now",
            found=f"{found.get(name)!r}",
            remedy=f"{remedy} another --out, or delete {folder}",
        )
    return first


def _text(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()


def without_locations(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop where things lay from settings that were read: what is left says what was measured, and how."""
    return {
        name: {k: v for k, v in value.items() if k not in _PLACES.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in settings.items()
    }


def write_object(folder: Path, record: ObjectRecord, files: Mapping[str, bytes]) -> None:
    """Keep what was found about an object; its record comes last.

    Args:
        folder: The evaluation's.
        record: What was found.
        files: Ending -> content of the files beside the record.
    """
    place = folder / OBJECTS_NAME
    for ending, content in files.items():
        write_atomically(place / f"{record.id}{ending}", content)
    text = json.dumps(dataclasses.asdict(record), sort_keys=True)
    write_atomically(place / f"{record.id}.json", f"{text}\n".encode())


def read_object(folder: Path, key: str) -> ObjectRecord | None:
    """Read the record of an object; None where there is none yet, or a file beside it is missing.

    Raises:
        InputError: It is damaged.
    """
    path = folder / OBJECTS_NAME / f"{key}.json"
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        rows = {
            str(name): {str(metric): float(value) for metric, value in row.items()}
            for name, row in record["rows"].items()
        }
        notes, files = (tuple(map(str, record[name])) for name in ("notes", "files"))
        found = ObjectRecord(str(record["id"]), rows, notes, str(record["bad"]), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            subject=path,
            expected="the record of an object",
            found=f"{error!r}",
            remedy="delete it and measure again",
        ) from error
    return found if all(path.with_name(key + ending).is_file() for ending in files) else None


def read_features(folder: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """Join the features of all objects: "target", "model" and the baselines -> (n, d)."""
    parts: dict[str, list[np.ndarray]] = {}
    for key in keys:
        path = folder / OBJECTS_NAME / f"{key}.npz"
        if path.is_file():
            for name, values in read_arrays(path).items():
                parts.setdefault(name.replace("_", " "), []).append(values)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays that belong to an object.

    Raises:
        InputError: They are damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise InputError(
            subject=path,
            expected="arrays",
            found=error,
            remedy="delete it and measure again: the same command",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: It is none.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            subject=path, expected="JSON", found=error, remedy="delete it and measure again"
        ) from error
    if not isinstance(record, dict):
        raise InputError(
            subject=path, expected="a JSON object", found=type(record).__name__, remedy="delete it"
        )
    return record
