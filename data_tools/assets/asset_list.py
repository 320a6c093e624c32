"""The asset list ``assets.parquet``, which contains the meshes to render and their metadata.

``python -m data_tools fetch`` writes the list, and ``render`` reads it. The columns are the fields of ``Asset``. A mesh
is identified by a path in the assets folder or by a URL, from which the renderer downloads the mesh.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow
import pyarrow.parquet

from lrm_pl.data.manifest import write_atomically
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import InputError

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".fbx")

#: The supported formats as text for messages, for example ``glb, gltf``.
MESH_FORMATS = ", ".join(suffix[1:] for suffix in MESH_SUFFIXES)

LIST_NAME = "assets.parquet"

#: Up axis of an OBJ or PLY file. These formats do not define an up axis. "" is the default, y.
UpAxis = Literal["", "y", "z"]

MAX_ID_LENGTH = 80

SHA256_PATTERN = re.compile("([0-9a-f]{64})?")


class AssetsError(InputError):
    """Raised if an assets folder, ``assets.parquet`` or ``assets.csv`` is missing or invalid."""


class AssetError(InputError):
    """Raised if an asset cannot be rendered. The message is stored in ``failures.jsonl`` as the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asset:
    """A mesh file and its metadata.

    Attributes:
        id: Key of the sample in the shards.
        file: Path relative to the assets folder, with forward slashes, or URL.
        sha256: Expected hash of the mesh file, without textures and materials. If "", the file is not verified.
        name: Display name.
        creator: Author.
        source: Origin.
        license: SPDX id if the license is known, otherwise the license name that the source specifies.
        tags: Categories and keywords.
        split: "train" or "val" if the source defines the split, otherwise "".
        up: Up axis of an OBJ or PLY file.
    """

    id: str
    file: str
    sha256: str
    name: str
    creator: str
    source: str
    license: str
    tags: tuple[str, ...] = ()
    split: Literal["", "train", "val"] = ""
    up: UpAxis = ""

    @property
    def is_remote(self) -> bool:
        """Whether ``file`` is a URL."""
        return "://" in self.file

    def record(self) -> dict[str, Any]:
        """Return the metadata to store in the sample."""
        return {
            "name": self.name, "license": self.license, "creator": self.creator, "source": self.source
        }  # fmt: skip


#: Columns of ``assets.parquet``.
LIST_SCHEMA = pyarrow.schema([
    (field.name, pyarrow.list_(pyarrow.string()) if field.name == "tags" else pyarrow.string())
    for field in dataclasses.fields(Asset)
])  # fmt: skip


def hashed_id(text: str) -> str:
    """Replace invalid characters in a name with "_", and append a hash of the original name."""
    suffix = "_" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[: MAX_ID_LENGTH - len(suffix)] + suffix


def read_ids(folder: Path) -> dict[str, str]:
    """Return the mapping from files to ids in ``assets.parquet``, or {} if the list is missing or damaged."""
    try:
        table = pyarrow.parquet.read_table(folder / LIST_NAME, columns=["file", "id"], memory_map=False)
    except (OSError, pyarrow.ArrowException):
        return {}
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def write_list(folder: Path, assets: Iterable[Asset]) -> None:
    """Write ``assets.parquet``, sorted by id."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_table(assets), sink)
    write_atomically(folder / LIST_NAME, sink.getvalue().to_pybytes())


def list_matches(folder: Path, assets: Iterable[Asset]) -> bool:
    """Return whether ``assets.parquet`` contains exactly the given assets. If the list is damaged, return False."""
    try:
        return bool(pyarrow.parquet.read_table(folder / LIST_NAME, memory_map=False).equals(_table(assets)))
    except (OSError, pyarrow.ArrowException):
        return False


def _table(assets: Iterable[Asset]) -> pyarrow.Table:
    rows = sorted(assets, key=lambda asset: asset.id)
    columns = {name: [getattr(asset, name) for asset in rows] for name in LIST_SCHEMA.names}
    return pyarrow.table(columns, LIST_SCHEMA)


def read_list(folder: Path) -> tuple[Asset, ...]:
    """Read and validate ``assets.parquet``.

    Mesh files are not opened. The renderer verifies the hashes.

    Args:
        folder: Folder of assets.

    Returns:
        The assets, sorted by id.

    Raises:
        AssetsError: The list is damaged or empty, a column is invalid, an id is invalid or occurs twice, a mesh has an
            unsupported suffix, a path is outside the folder, or a hash, split or up axis is invalid.
    """
    path = folder / LIST_NAME
    remedy = "write the list again with `python -m data_tools fetch`"
    try:
        # Missing columns are filled with null values.
        table = pyarrow.parquet.read_table(path, schema=LIST_SCHEMA, memory_map=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise AssetsError("a Parquet file with text columns", error, remedy, path) from error
    if incomplete := [name for name in table.schema.names if table[name].null_count]:
        expected = f"the columns {', '.join(LIST_SCHEMA.names)} without missing values"
        raise AssetsError(expected, f"missing values in {incomplete[0]}", remedy, path)
    rows = sorted(table.to_pylist(), key=lambda row: row["id"])
    assets = tuple(Asset(**row | {"tags": tuple(row["tags"])}) for row in rows)
    if not assets:
        raise AssetsError("at least one asset", "none", remedy, path)
    for asset, following in itertools.pairwise(assets):
        if asset.id == following.id:
            raise AssetsError("unique ids", f"{asset.id!r} twice", remedy, path)
    for asset in assets:
        _validate(asset, f"{path}: asset {asset.id!r}", remedy)
    return assets


def _validate(asset: Asset, where: str, remedy: str) -> None:
    is_mesh = asset.file.lower().endswith(MESH_SUFFIXES)
    is_outside = asset.file.startswith("/") or ".." in asset.file.split("/")
    for expected, valid, found in (
        ("an id of letters, digits, '_' and '-'", KEY_PATTERN.fullmatch(asset.id), asset.id),
        (f"a file name that ends in one of {MESH_FORMATS}", is_mesh, asset.file),
        ("a path inside the folder or a URL", asset.is_remote or not is_outside, asset.file),
        ("a sha256 or an empty string", SHA256_PATTERN.fullmatch(asset.sha256), asset.sha256),
        ('the split "train", "val" or ""', asset.split in ("", "train", "val"), asset.split),
        ('the up axis "y", "z" or ""', asset.up in get_args(UpAxis), asset.up),
    ):
        if not valid:
            raise AssetsError(expected, repr(found), remedy, where)
