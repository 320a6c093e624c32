"""Records of the evaluated objects, which allow any number of processes to resume an interrupted evaluation.

OUT/settings.json      protocol, weights and shards, which must match when an evaluation is resumed
OUT/objects/ID.json    metrics of the model and the baselines for one object
OUT/objects/ID.png     image strip of the object
OUT/objects/ID.npz     image features for FID and KID
OUT/results.json, results.md, index.html    written last
"""

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError

#: Parent folder of evaluations and comparisons for which ``--out`` is not passed.
DEFAULT_FOLDER = Path("evaluation")

SETTINGS_NAME, OBJECTS_NAME, RESULTS_NAME = "settings.json", "objects", "results.json"

#: Settings that describe where the model and the data were read from. Hashes in other settings identify the content.
_LOCATION_FIELDS = {"network": ("source", "step"), "data": ("folder",)}


@dataclasses.dataclass(frozen=True)
class ObjectRecord:
    """Stored result of one object.

    Attributes:
        id: Id of the object.
        rows: Metrics of the model (key "model") and of each baseline.
        notes: Reasons for missing metrics.
        bad: Reason why the object could not be evaluated, or "" if it was evaluated.
        files: File name suffixes of the files that are stored with the record.
    """

    id: str
    rows: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()
    bad: str = ""
    files: tuple[str, ...] = ()


def open_evaluation(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Create the folder of an evaluation, or check that an existing folder belongs to this evaluation.

    Baselines can be added to an existing evaluation.

    Args:
        folder: Folder of the evaluation.
        settings: Settings of the evaluation.

    Returns:
        Settings with which the folder was created. The locations of the model and the data may be outdated.

    Raises:
        InputError: The folder belongs to a different evaluation.
    """
    path = folder / SETTINGS_NAME
    (folder / OBJECTS_NAME).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, settings)
    first = read_json(path)
    if settings.get("baselines") and first.get("baselines") is False:
        first = {**first, "baselines": True}
        write_json(path, first)
    expected, found = without_locations(json.loads(json.dumps(settings))), without_locations(first)
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        name = different[0]
        remedy = "pass --baseline, or choose" if different == ["baselines"] else "choose"
        raise InputError(
            subject=path,
            expected=f"{name} {expected.get(name)!r}",
            found=f"{found.get(name)!r} in the folder",
            remedy=f"{remedy} another folder with --out, or delete {folder}",
        )
    return first


def without_locations(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the locations of the model and the data from settings.

    The remaining settings identify an evaluation.
    """
    return {
        name: {k: v for k, v in value.items() if k not in _LOCATION_FIELDS.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in settings.items()
    }


def write_object(folder: Path, record: ObjectRecord, files: Mapping[str, bytes]) -> None:
    """Write the files of an object, and then the record of the object.

    Args:
        folder: Folder of the evaluation.
        record: Record of the object.
        files: File contents by file name suffix.
    """
    objects = folder / OBJECTS_NAME
    for ending, content in files.items():
        write_atomically(objects / f"{record.id}{ending}", content)
    write_json(objects / f"{record.id}.json", dataclasses.asdict(record))


def read_object(folder: Path, key: str) -> ObjectRecord | None:
    """Read the record of an object, or return None if the record or one of the files does not exist.

    Raises:
        InputError: The record is damaged.
    """
    path = folder / OBJECTS_NAME / f"{key}.json"
    if not path.is_file():
        return None
    record = read_json(path)
    with damaged_file(path, "the record of an object"):
        rows = {
            str(name): {str(metric): float(value) for metric, value in row.items()}
            for name, row in record["rows"].items()
        }
        notes, files = (tuple(map(str, record[name])) for name in ("notes", "files"))
        found = ObjectRecord(str(record["id"]), rows, notes, str(record["bad"]), files)
    return found if all(path.with_name(key + ending).is_file() for ending in files) else None


def read_features(folder: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """Read the image features of objects, and concatenate them to arrays of shape (n, d).

    Returns:
        Features of the targets (key "target"), the model and each baseline.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for key in keys:
        path = folder / OBJECTS_NAME / f"{key}.npz"
        if path.is_file():
            for name, values in read_arrays(path).items():
                parts.setdefault(name.replace("_", " "), []).append(values)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays in an .npz file.

    Raises:
        InputError: The file is missing or damaged.
    """
    with damaged_file(path, "an .npz file"), np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains a JSON object.

    Raises:
        InputError: The file is missing or does not contain a JSON object.
    """
    with damaged_file(path, "a JSON object"):
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise TypeError(type(record).__name__)
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys, so that the files of equal records are identical."""
    write_atomically(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def damaged_file(path: Path, expected: str) -> Iterator[None]:
    """Return a context manager that converts exceptions caused by a missing or damaged file to ``InputError``."""
    try:
        yield
    except (
        OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError, zipfile.BadZipFile,
        zlib.error,
    ) as error:  # fmt: skip
        raise InputError(
            subject=path,
            expected=expected,
            found=repr(error),
            remedy="delete the file and run the command again",
        ) from error
