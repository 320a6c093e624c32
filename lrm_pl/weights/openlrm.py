"""Conversion of weights of OpenLRM 1.1 (3DTopia/OpenLRM).

OpenLRM differs from this project in the following ways:

- Poses are OpenGL camera-to-world matrices. The weights of the first layer of the camera embedder are changed so that
  it accepts OpenCV poses.
- Images are not normalized, and register tokens are dropped. This is configured by options of ``ImageEncoder``.
- The class token of DINOv2 has a separate position embedding. In this project, as in timm, this embedding is added to
  the weights of the class token. The position embeddings of the patches are resized to the image size with bicubic
  interpolation and antialiasing.
- The third plane has the axes (z, y). This is configured by ``plane_layout``.
- Quadrature uses the midpoints of neighboring samples, and half of the samples are importance samples. This is
  configured by options of ``Renderer``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.weights.key_map import (
    Conversion,
    ConversionError,
    Hyperparameters,
    KeyMapper,
    Rules,
    decoder_rules,
    default_heads,
    meta_network,
    square_side,
)

#: Maps the widths of the encoder and the transformer to the image size and the number of samples per ray in the
#: published small, base and large models.
_PUBLISHED = {(384, 512): (224, 96), (768, 768): (336, 96), (768, 1024): (448, 128)}

#: Maps the width of the encoder, which has four register tokens, to the name in timm.
_ENCODERS = {384: "vit_small_patch14_reg4_dinov2", 768: "vit_base_patch14_reg4_dinov2"}

_PATCH = 14

_BLOCK, _LAYER = r"transformer\.blocks\.(\d+)", r"transformer.layers.\1"
_RULES: Rules = {
    r"encoder\.vit\.reg_token": ("encoder.model.register_tokens",),
    r"encoder\.vit\.(.+)": (r"encoder.model.\1",),
    r"(camera_embedder\..+|transformer\.norm\..+)": (r"\1",),
    r"transformer\.tokens": ("pos_embed",),
    rf"{_BLOCK}\.cross_norm\.norm\.(.+)": (rf"{_LAYER}.norm1.norm.\2",),
    rf"{_BLOCK}\.self_norm\.norm\.(.+)": (rf"{_LAYER}.norm2.norm.\2",),
    rf"{_BLOCK}\.mlp_norm\.norm\.(.+)": (rf"{_LAYER}.norm3.norm.\2",),
    rf"{_BLOCK}\.cross_norm\.modulation\.(.+)": (rf"{_LAYER}.norm1.mlp.\2",),
    rf"{_BLOCK}\.self_norm\.modulation\.(.+)": (rf"{_LAYER}.norm2.mlp.\2",),
    rf"{_BLOCK}\.mlp_norm\.modulation\.(.+)": (rf"{_LAYER}.norm3.mlp.\2",),
    rf"{_BLOCK}\.cross_attention\.q\.weight": (rf"{_LAYER}.cross_attn.q_proj_weight",),
    rf"{_BLOCK}\.cross_attention\.kv\.weight": tuple(
        rf"{_LAYER}.cross_attn.{part}_proj_weight" for part in "kv"
    ),
    rf"{_BLOCK}\.cross_attention\.out\.weight": (rf"{_LAYER}.cross_attn.out_proj.weight",),
    rf"{_BLOCK}\.self_attention\.qkv\.weight": (rf"{_LAYER}.self_attn.in_proj_weight",),
    rf"{_BLOCK}\.self_attention\.out\.weight": (rf"{_LAYER}.self_attn.out_proj.weight",),
    rf"{_BLOCK}\.mlp\.0\.(.+)": (rf"{_LAYER}.mlp.0.\2",),
    rf"{_BLOCK}\.mlp\.2\.(.+)": (rf"{_LAYER}.mlp.3.\2",),
    r"upsampler\.deconvolution\.(.+)": (r"upsampler.\1",),
}


def convert_openlrm(
    state: Mapping[Any, Any],
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008 - frozen
) -> Conversion:
    """Convert a state dict of OpenLRM 1.1. Sizes are determined from the tensors.

    Args:
        state: State dict of OpenLRM.
        hyperparameters: Hyperparameters that cannot be determined from the tensors.

    Raises:
        ConversionError: A tensor is missing, unexpected or invalid, or a required hyperparameter is missing.
    """
    keys = KeyMapper("OpenLRM", state)
    tokens, dim = keys.shape_of("pos_embed", 3)[1:]
    camera_dim = keys.shape_of("camera_embedder.mlp.2.weight", 2)[0]
    encoder_dim = keys.shape_of("encoder.model.cls_token", 3)[2]
    channels, upsample = keys.shape_of("upsampler.weight", 4)[1:3]
    width = keys.shape_of("synthesizer.decoder.net.0.weight", 2)[0]
    depth = keys.count("transformer.layers.{}.mlp.0.weight")
    layers = keys.count("synthesizer.decoder.net.{}.weight", step=2)
    published = _PUBLISHED.get((encoder_dim, dim), (None, None))
    image_size = hyperparameters.image_size or published[0]
    samples = hyperparameters.samples_per_ray or published[1]
    if image_size is None or samples is None:
        raise ConversionError(
            subject=keys.source,
            expected="the widths of a published model",
            found=f"an encoder width of {encoder_dim} and a transformer width of {dim}",
            remedy="set --image-size and --samples-per-ray",
        )
    encoder = {
        "name": _ENCODERS.get(encoder_dim, _ENCODERS[384]), "image_size": image_size, "frozen": False,
        "normalize": False, "tokens": "class_and_patches", "dim": encoder_dim,
        "depth": keys.count("encoder.model.blocks.{}.norm1.weight"),
        "heads": default_heads(encoder_dim, hyperparameters.encoder_heads, "--encoder-heads", keys.source),
    }  # fmt: skip
    decoder = {
        "channels": channels, "width": width, "layers": layers, "activation": "relu",
        "density_activation": "softplus", "density_bias": -1.0, "color_margin": 0.001,
    }  # fmt: skip
    lrm = {
        "encoder": encoder, "decoder": decoder, "dim": dim, "depth": depth,
        "heads": default_heads(dim, hyperparameters.heads, "--heads", keys.source), "camera": 16,
        "camera_dim": camera_dim, "plane_tokens": square_side(tokens / 3, "3 s s triplane tokens", keys.source),
        "upsample": upsample, "blocks": "lrm", "plane_layout": "openlrm",
    }  # fmt: skip
    renderer = {
        "samples_per_ray": samples, "importance_samples": samples // 2, "bounds": "box", "quadrature": "midpoints",
    }  # fmt: skip
    network = meta_network(lrm)
    _convert_encoder(keys, encoder_dim, image_size)
    opengl = torch.tensor([1.0, -1.0, -1.0, 1.0] * 3 + [1.0] * 4)  # rows of a 3 x 4 pose, and intrinsics
    name = "camera_embedder.mlp.0.weight"
    weight = keys.take(name, (camera_dim, 16))
    keys.put(name, weight * opengl.to(weight.device), (name,), "OpenGL poses to OpenCV")
    for number in range(depth):
        _split_cross_attention(keys, number, dim, encoder_dim)
    keys.map(network, _RULES | decoder_rules("synthesizer.decoder.net", layers))
    return Conversion({"lrm": lrm, "renderer": renderer}, keys.weights, keys.report)


def _convert_encoder(keys: KeyMapper, dim: int, image_size: int) -> None:
    source, target = "encoder.model", "encoder.vit"
    number = keys.shape_of(f"{source}.pos_embed", 3)[1] - 1
    side, patches = (
        square_side(number, "a square of patches and a class token", keys.source),
        image_size // _PATCH,
    )
    positions = keys.take(f"{source}.pos_embed", (1, 1 + number, dim))
    cls_token = keys.take(f"{source}.cls_token", (1, 1, dim)) + positions[:, :1]
    names = f"{source}.cls_token", f"{source}.pos_embed"
    keys.put(f"{target}.cls_token", cls_token, names, "plus its position embedding")
    resized = _resize_positions(positions[:, 1:], patches) if keys.is_valid else positions
    keys.put(f"{target}.pos_embed", resized, names[1:], f"{side} -> {patches}")
    keys.ignore(f"{source}.mask_token", "used only in the training of DINOv2")


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings of shape (1, n * n, M) to (1, side * side, M), as in DINOv2 with registers."""
    stored = round(positions.shape[1] ** 0.5)
    if stored == side:
        return positions
    grid = positions.view(1, stored, stored, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)


def _split_cross_attention(keys: KeyMapper, number: int, dim: int, image_dim: int) -> None:
    """Split the combined q, k and v projection, which exists if image tokens are as wide as the transformer."""
    source, target = f"transformer.layers.{number}.cross_attn.in_proj_weight", f"transformer.blocks.{number}"
    if source in keys.state:
        weight = keys.take(source, (3 * dim, image_dim))
        keys.put(f"{target}.cross_attention.q.weight", weight[:dim], (source,), "split")
        keys.put(f"{target}.cross_attention.kv.weight", weight[dim:], (source,), "split")
