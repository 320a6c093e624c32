"""Schema of a sample, which represents one object in a shard, and encoding of samples as tar members.

A sample with key ``chair`` and V views has the following members, which are sorted by name in shards:

    chair.json           fields of ``SampleInfo``
    chair.c2w.npy        (V, 4, 4) float32 camera-to-world poses, OpenCV convention
    chair.fxfycxcy.npy   (V, 4) float32 intrinsics, normalized by image width and height
    chair.view_000.webp  one per view, RGBA with 8 bits and straight alpha, lossless WebP or PNG
    chair.view_001.webp  ...
    chair.measures.json  optional, measurements of the object (data_tools/quality/measures.py)
    chair.depth_000.png  optional, one per view, 16 bits, 65535 * depth along the camera z axis / ``MAX_DEPTH``
    chair.normal_000.png optional, one per view, RGB with 8 bits, world-space normal n as (n + 1) / 2
    chair.surface.npy    optional, (20000, 6) float32 world-space surface points and normals

Depth and normals are 0 at pixels whose center is not covered by a surface. Such pixels have zero or partial alpha. No
member is a pickle. All members are validated before use.
"""

import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lrm_pl.conventions import RIGID_TOLERANCE, rigid_error
from lrm_pl.errors import InputError, error_subject
from lrm_pl.images import DECODE_ERRORS, webp_size

SCHEMA_VERSION = 2

#: Keys contain no dot, because WebDataset splits names at the first dot. Names in a tar have at most 100 bytes.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]{1,80}")

IMAGE_FORMATS = ("webp", "png")

#: Names of the members that contain views.
VIEW_PATTERN = re.compile(rf"view_\d{{3}}\.({'|'.join(IMAGE_FORMATS)})")

#: Maximum side of a view in pixels, which is checked before decoding as a protection against decompression bombs.
MAX_IMAGE_SIDE = 4096

#: Settings with which encoding is as fast as PNG. Files that are a few percent smaller would take ten times as long.
_WEBP_EFFORT = {"method": 2, "quality": 20}

#: Name of the member with the ``SampleInfo``.
INFO_MEMBER = "json"

#: Members that are always read.
NEEDED_MEMBERS = (INFO_MEMBER, "c2w.npy", "fxfycxcy.npy")

#: Name of the member with surface points and normals.
SURFACE_MEMBER = "surface.npy"

#: Names of optional members, which are read only on request.
EXTRA_PATTERN = re.compile(r"measures\.json|surface\.npy|(depth|normal)_\d{3}\.png")

#: Exceptions that the header parser of numpy raises for damaged .npy files.
HEADER_ERRORS = (ValueError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError)

#: Depth that the largest pixel value of a depth image represents, in scene units.
MAX_DEPTH = 8.0


class SampleError(InputError):
    """Error raised if a sample violates the schema."""


def sample_subject(key: str) -> AbstractContextManager[None]:
    """Return a context manager that adds the key of a sample to errors that have no subject."""
    return error_subject(f"sample {key!r}")


@dataclasses.dataclass(frozen=True)
class SampleInfo:
    """Metadata of an object, stored as ``<key>.json``.

    Attributes:
        id: Key of the sample, which is unique in the data set.
        name: Display name.
        license: License of the mesh, or "unknown".
        creator: Creator of the mesh, or "unknown".
        source: Origin of the mesh (library, file name, URL).
        seed: Seed of the camera poses and of the Cycles renderer.
        renderer: Program, version and device type with which the views were rendered.
        views: Number of views.
        schema_version: Version of this schema.
        sha256: SHA-256 hash of the rendered mesh file in lowercase hexadecimal digits, or "" if unknown.
    """

    id: str
    name: str
    license: str
    creator: str
    source: str
    seed: int
    renderer: str
    views: int
    schema_version: int = SCHEMA_VERSION
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Encoded views, cameras and metadata of one object.

    Attributes:
        info: Metadata of the object.
        c2w: (V, 4, 4) float32 camera-to-world poses in the OpenCV convention.
        fxfycxcy: (V, 4) float32 normalized intrinsics.
        views: Encoded images of the V views. The entry of a view that was not read is empty.
        extras: Mapping from the names of optional members to their content.
    """

    info: SampleInfo
    c2w: npt.NDArray[np.float32]
    fxfycxcy: npt.NDArray[np.float32]
    views: tuple[bytes, ...]
    extras: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def view_member(index: int, image_format: str = "webp") -> str:
    """Return the name of the member with a view, for example ``view_003.webp``."""
    return f"view_{index:03d}.{image_format}"


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Encode a sample as tar members deterministically.

    Returns:
        Mapping from member name without the key (``json``, ``c2w.npy``, ...) to content.

    Raises:
        SampleError: The sample violates the schema.
    """
    if unknown := sorted(name for name in sample.extras if not EXTRA_PATTERN.fullmatch(name)):
        raise SampleError(
            expected=f"names of optional members that match {EXTRA_PATTERN.pattern}", found=unknown
        )
    members = {
        INFO_MEMBER: encode_info(sample.info),
        "c2w.npy": encode_array(sample.c2w),
        "fxfycxcy.npy": encode_array(sample.fxfycxcy),
    }
    for index, view in enumerate(sample.views):
        members[view_member(index, _image_format(view))] = view
    members |= {name: sample.extras[name] for name in sorted(sample.extras)}
    decode_sample(sample.info.id, members)  # validates the members
    return members


def encode_info(info: SampleInfo) -> bytes:
    """Encode metadata as the member ``json``. An unknown hash is omitted."""
    record = {name: value for name, value in dataclasses.asdict(info).items() if name != "sha256" or value}
    return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()


def decode_sample(key: str, members: Mapping[str, bytes], selected: Sequence[int] | None = None) -> Sample:
    """Decode a sample from tar members and validate it.

    Args:
        key: Key of the sample in the tar.
        members: Mapping from member name without the key to content.
        selected: Indices of the views in ``members``. If None, ``members`` must contain all views.

    Raises:
        SampleError: A member is missing or invalid, or the sample violates the schema.
    """
    with sample_subject(key):
        if not KEY_PATTERN.fullmatch(key):
            raise SampleError(
                expected="a key that consists of letters, digits, '_' and '-'", found=f"{key!r}"
            )
        if missing := [name for name in NEEDED_MEMBERS if name not in members]:
            raise SampleError(expected=f"the member {key}.{missing[0]}", found=sorted(members))
        info = decode_info(key, members[INFO_MEMBER])
        images: dict[int, bytes] = {}
        for name in sorted(name for name in members if re.match(r"view_\d+\.", name)):
            index = int(name[5:8]) if VIEW_PATTERN.fullmatch(name) else info.views
            if index >= info.views or index in images:
                raise SampleError(
                    expected=f"each of {info.views} views once", found=f"the additional member {name}"
                )
            images[index] = members[name]
        for index in range(info.views) if selected is None else selected:
            if index not in images:
                raise SampleError(f"each of {info.views} views once", f"no {view_member(index)}")
        c2w = decode_array(key, "c2w.npy", members["c2w.npy"], (info.views, 4, 4))
        if (error := rigid_error(c2w)) > RIGID_TOLERANCE:
            raise SampleError(
                expected=f"rigid poses with a deviation of at most {RIGID_TOLERANCE}",
                found=f"a deviation of {error:.2g}",
                remedy="store camera-to-world poses that consist of a rotation, a translation and the last row 0 0 0 1",
            )
        fxfycxcy = decode_array(key, "fxfycxcy.npy", members["fxfycxcy.npy"], (info.views, 4))
        if not np.isfinite(fxfycxcy).all() or (fxfycxcy[:, :2] <= 0).any():
            raise SampleError("finite intrinsics with positive focal lengths", fxfycxcy.tolist())
        views = tuple(images.get(index, b"") for index in range(info.views))
        extras = {name: content for name, content in members.items() if EXTRA_PATTERN.fullmatch(name)}
        return Sample(info, c2w, fxfycxcy, views, extras)


def decode_image(key: str, encoded: bytes) -> npt.NDArray[np.uint8]:
    """Decode one view.

    Args:
        key: Key of the sample for error messages.
        encoded: PNG or WebP bytes.

    Returns:
        (H, W, 4) uint8 image with straight alpha.

    Raises:
        SampleError: The view is not a PNG or WebP image, is not RGBA, or is too large.
    """
    with sample_subject(key):
        _require_small(webp_size(encoded))
        try:
            with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
                if image.mode != "RGBA":
                    raise SampleError(
                        "RGBA views", f"mode {image.mode}", "render the views with an alpha channel"
                    )
                _require_small(image.size)
                return np.array(image, dtype=np.uint8)
        except SampleError:
            raise
        except DECODE_ERRORS as error:
            raise SampleError(
                "a PNG or WebP view", f"{len(encoded)} bytes of invalid data: {error}"
            ) from error


def _require_small(size: tuple[int, int]) -> None:
    if max(size) > MAX_IMAGE_SIDE:
        raise SampleError(expected=f"views of at most {MAX_IMAGE_SIDE} pixels per side", found=size)


def encode_image(rgba: npt.NDArray[np.uint8]) -> bytes:
    """Encode one (H, W, 4) uint8 view with straight alpha deterministically.

    Views are encoded as lossless WebP, which is a quarter smaller than PNG and is decoded two to three times as fast.
    Fully opaque views are encoded as PNG, because WebP would drop the alpha channel.

    Raises:
        SampleError: The array is not an RGBA image of uint8.
    """
    if rgba.ndim != 3 or rgba.shape[2] != 4 or rgba.dtype != np.uint8:
        raise SampleError(
            expected="a uint8 RGBA image of shape (H, W, 4)",
            found=f"shape {rgba.shape} and dtype {rgba.dtype}",
        )
    buffer, image = io.BytesIO(), Image.fromarray(rgba, mode="RGBA")
    if (rgba[..., 3] == 255).all():
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="WEBP", lossless=True, exact=True, **_WEBP_EFFORT)
    return buffer.getvalue()


def encode_array(array: npt.NDArray[np.float32]) -> bytes:
    """Encode an array in the ``.npy`` format deterministically."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_array(key: str, name: str, encoded: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Decode a float32 array.

    Args:
        key: Key of the sample for error messages.
        name: Name of the member.
        encoded: Content of the member.
        shape: Expected shape.

    Raises:
        SampleError: The member is not a float32 array of the expected shape.
    """
    header = encoded[: 10 + int.from_bytes(encoded[8:10], "little")]
    with sample_subject(key):
        try:
            found, fortran, dtype = _decode_header(header)
        except HEADER_ERRORS as error:
            raise SampleError(expected=f"a numpy array in {key}.{name}", found=error) from error
        # Checked before allocation, because a small header can declare terabytes.
        if found != shape or dtype != np.float32 or fortran:
            raise SampleError(
                expected=f"{name} of shape {shape} and dtype float32",
                found=f"shape {found} and dtype {dtype}{' in Fortran order' if fortran else ''}",
            )
        content = encoded[len(header) :]
        if len(content) != 4 * math.prod(shape):
            raise SampleError(
                expected=f"{4 * math.prod(shape)} bytes of data in {key}.{name}",
                found=f"{len(content)} bytes",
            )
    return np.frombuffer(content, dtype=np.float32).reshape(shape).copy()


@functools.lru_cache(maxsize=128)
def _decode_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse the header of an ``.npy`` file. Results are cached, because parsing is slow and most headers are identical.

    Returns:
        The shape, whether the array is in Fortran order, and the dtype.
    """
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the .npy format")
    return np.lib.format.read_array_header_1_0(file)


def _image_format(encoded: bytes) -> str:
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    raise SampleError("views encoded as PNG or WebP", f"bytes that begin with {encoded[:12]!r}")


def decode_info(key: str, encoded: bytes) -> SampleInfo:
    """Decode the member ``json`` of a sample.

    Raises:
        SampleError: The JSON is invalid, or has unexpected fields, a different schema version or a different id.
    """
    with sample_subject(key):
        try:
            record: Any = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise SampleError(expected=f"valid JSON in {key}.json", found=error) from error
        if not isinstance(record, dict):
            raise SampleError(expected=f"a JSON object in {key}.json", found=type(record).__name__)
        if (version := record.get("schema_version")) != SCHEMA_VERSION:
            raise SampleError(
                expected=f"schema version {SCHEMA_VERSION}",
                found=f"{version!r}",
                remedy="render the object again with this version, or use the version of lrm_pl that wrote the sample",
            )
        expected = {field.name: field.type for field in dataclasses.fields(SampleInfo)}
        record = {"sha256": ""} | record
        wrong = [name for name, kind in expected.items() if type(record.get(name)) is not kind]
        if wrong or set(record) != set(expected):
            raise SampleError(
                expected=f"the fields {sorted(expected)} with valid types",
                found=f"{sorted(record)}" + (f", where {wrong} are missing or invalid" if wrong else ""),
            )
        if record["id"] != key:
            raise SampleError(expected=f"the id {key!r} in {key}.json", found=f"{record['id']!r}")
        if not 1 <= record["views"] <= 999:
            raise SampleError(expected="1 to 999 views", found=record["views"])
        return SampleInfo(**record)
