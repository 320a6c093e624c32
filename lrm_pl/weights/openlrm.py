"""Conversion of weights of OpenLRM 1.1 (3DTopia/OpenLRM).

OpenLRM differs from this project in the following ways:

- Poses are OpenGL camera-to-world matrices. The weights of the first layer of the camera embedder are changed so that
  they accept OpenCV poses.
- Images are not normalized, and register tokens are dropped. This is configured by options of ``ImageEncoder``.
- The class token of DINOv2 has a position embedding, which is added to the token here, as in timm. The position
  embeddings of the patches are resized to the image size with bicubic interpolation and antialiasing.
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
    default_heads,
    patch_sides,
    plane_side,
)

#: Maps the widths of the encoder and the transformer to the image size and the number of samples per ray in the
#: published small, base and large models.
_PUBLISHED = {(384, 512): (224, 96), (768, 768): (336, 96), (768, 1024): (448, 128)}

#: Maps the width of an encoder with four register tokens to the name in timm, the depth and the number of heads.
_ENCODERS = {384: ("vit_small_patch14_reg4_dinov2", 12, 6), 768: ("vit_base_patch14_reg4_dinov2", 12, 12)}

_PATCH, _REGISTERS = 14, 4


def convert_openlrm(
    state: Mapping[Any, Any],
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008 - frozen
) -> Conversion:
    """Convert a state dict of OpenLRM 1.1. Sizes are determined from the tensors.

    Args:
        state: State dict of OpenLRM.
        hyperparameters: Hyperparameters that cannot be determined from the tensors.

    Raises:
        ConversionError: A tensor is missing, unexpected or invalid, or a hyperparameter must be given.
    """
    keys = KeyMapper("OpenLRM", state)
    tokens, dim = keys.shape_of("pos_embed", 3)[1:]
    camera_dim = keys.shape_of("camera_embedder.mlp.2.weight", 2)[0]
    encoder_dim = keys.shape_of("encoder.model.cls_token", 3)[2]
    channels, upsample = keys.shape_of("upsampler.weight", 4)[1:3]
    width = keys.shape_of("synthesizer.decoder.net.0.weight", 2)[0]
    depth, layers = (
        keys.count("transformer.layers.{}.mlp.0.weight"),
        keys.count("synthesizer.decoder.net.{}.weight", step=2),
    )
    encoder_depth = keys.count("encoder.model.blocks.{}.norm1.weight")
    published = _PUBLISHED.get((encoder_dim, dim), (None, None))
    image_size, samples = (
        hyperparameters.image_size or published[0],
        hyperparameters.samples_per_ray or published[1],
    )
    if image_size is None or samples is None:
        raise ConversionError(
            subject=keys.source,
            expected="the widths of a published model",
            found=f"{encoder_dim} and {dim}",
            remedy="give --image-size and --samples-per-ray",
        )
    heads = default_heads(dim, hyperparameters.heads, "--heads", keys.source)
    encoder_heads = default_heads(encoder_dim, hyperparameters.encoder_heads, "--encoder-heads", keys.source)

    _encoder(keys, encoder_dim, encoder_depth, image_size)
    _camera(keys, camera_dim)
    keys.copy("pos_embed", "transformer.tokens", (1, tokens, dim))
    for number in range(depth):
        _block(keys, number, dim, encoder_dim, camera_dim)
    keys.norm("transformer.norm", "transformer.norm", dim)
    keys.copy("upsampler.weight", "upsampler.deconvolution.weight", (dim, channels, upsample, upsample))
    keys.copy("upsampler.bias", "upsampler.deconvolution.bias", (channels,))
    keys.decoder("synthesizer.decoder.net", channels, width, layers)
    keys.finish()

    name, usual_depth, usual_heads = _ENCODERS.get(encoder_dim, (_ENCODERS[384][0], 0, 0))
    usual = encoder_dim in _ENCODERS and (encoder_depth, encoder_heads) == (usual_depth, usual_heads)
    sizes_of_encoder = {"dim": encoder_dim, "depth": encoder_depth, "heads": encoder_heads}
    encoder = {
        "name": name, "image_size": image_size, "frozen": False, "normalize": False, "tokens": "class_and_patches",
        **({} if usual else sizes_of_encoder),
    }  # fmt: skip
    decoder = {
        "channels": channels, "width": width, "layers": layers, "activation": "relu",
        "density_activation": "softplus", "density_bias": -1.0, "color_margin": 0.001,
    }  # fmt: skip
    lrm = {
        "encoder": encoder, "decoder": decoder, "dim": dim, "depth": depth, "heads": heads, "camera": 16,
        "camera_dim": camera_dim, "plane_tokens": plane_side(tokens, keys.source), "upsample": upsample,
        "blocks": "lrm", "plane_layout": "openlrm",
    }  # fmt: skip
    renderer = {
        "samples_per_ray": samples, "importance_samples": samples // 2, "bounds": "box", "quadrature": "midpoints",
    }  # fmt: skip
    return Conversion({"lrm": lrm, "renderer": renderer}, keys.weights, keys.report)


def _camera(keys: KeyMapper, dim: int) -> None:
    name = "camera_embedder.mlp.0.weight"
    opengl = torch.tensor([1.0, -1.0, -1.0, 1.0] * 3 + [1.0] * 4)  # rows of a 3 x 4 pose, and intrinsics
    weight = keys.take(name, (dim, 16))
    keys.put(name, weight * opengl.to(weight.device), (name,), "OpenGL poses to OpenCV")
    keys.copy("camera_embedder.mlp.0.bias", "camera_embedder.mlp.0.bias", (dim,))
    keys.linear("camera_embedder.mlp.2", "camera_embedder.mlp.2", dim, dim)


def _encoder(keys: KeyMapper, dim: int, depth: int, image_size: int) -> None:
    source, target = "encoder.model", "encoder.vit"
    keys.copy(
        f"{source}.patch_embed.proj.weight", f"{target}.patch_embed.proj.weight", (dim, 3, _PATCH, _PATCH)
    )
    keys.copy(f"{source}.patch_embed.proj.bias", f"{target}.patch_embed.proj.bias", (dim,))
    side, patches = patch_sides(keys.shape_of(f"{source}.pos_embed", 3)[1], image_size, _PATCH, keys.source)
    positions = keys.take(f"{source}.pos_embed", (1, 1 + side * side, dim))
    cls_token = keys.take(f"{source}.cls_token", (1, 1, dim))
    token = cls_token + positions[:, :1] if keys.is_valid else cls_token
    keys.put(
        f"{target}.cls_token",
        token,
        (f"{source}.cls_token", f"{source}.pos_embed"),
        "plus its position embedding",
    )
    resized = _resize_positions(positions[:, 1:], patches) if keys.is_valid else positions
    keys.put(f"{target}.pos_embed", resized, (f"{source}.pos_embed",), f"{side} -> {patches}")
    keys.copy(f"{source}.register_tokens", f"{target}.reg_token", (1, _REGISTERS, dim))
    keys.ignore(f"{source}.mask_token", "used in DINOv2's own training only")
    for number in range(depth):
        block = f"blocks.{number}"
        for norm in ("norm1", "norm2"):
            keys.norm(f"{source}.{block}.{norm}", f"{target}.{block}.{norm}", dim)
        for scale in ("ls1", "ls2"):
            keys.copy(f"{source}.{block}.{scale}.gamma", f"{target}.{block}.{scale}.gamma", (dim,))
        for layer, rows, columns in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim),
        ):  # fmt: skip
            keys.linear(f"{source}.{block}.{layer}", f"{target}.{block}.{layer}", rows, columns)
    keys.norm(f"{source}.norm", f"{target}.norm", dim)


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize position embeddings of shape (1, n * n, M) to (1, side * side, M), as in DINOv2 with registers."""
    stored = round(positions.shape[1] ** 0.5)
    if stored == side:
        return positions
    grid = positions.view(1, stored, stored, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)


def _block(keys: KeyMapper, number: int, dim: int, image_dim: int, camera_dim: int) -> None:
    source, target = f"transformer.layers.{number}", f"transformer.blocks.{number}"
    for norm, name in (("norm1", "cross_norm"), ("norm2", "self_norm"), ("norm3", "mlp_norm")):
        keys.norm(f"{source}.{norm}.norm", f"{target}.{name}.norm", dim)
        keys.linear(f"{source}.{norm}.mlp.1", f"{target}.{name}.modulation.1", 2 * dim, camera_dim)
    cross, target_cross = f"{source}.cross_attn", f"{target}.cross_attention"
    if f"{cross}.in_proj_weight" in keys.state:
        together = keys.take(f"{cross}.in_proj_weight", (3 * dim, image_dim))
        for name, part in (("q", together[:dim]), ("kv", together[dim:])):
            keys.put(f"{target_cross}.{name}.weight", part, (f"{cross}.in_proj_weight",), "split")
    else:
        keys.copy(f"{cross}.q_proj_weight", f"{target_cross}.q.weight", (dim, dim))
        parts = (f"{cross}.k_proj_weight", f"{cross}.v_proj_weight")
        keys.concatenate(parts, f"{target_cross}.kv.weight", (dim, image_dim))
    keys.linear(f"{cross}.out_proj", f"{target_cross}.out", dim, dim, bias=False)
    keys.copy(f"{source}.self_attn.in_proj_weight", f"{target}.self_attention.qkv.weight", (3 * dim, dim))
    keys.linear(f"{source}.self_attn.out_proj", f"{target}.self_attention.out", dim, dim, bias=False)
    keys.linear(f"{source}.mlp.0", f"{target}.mlp.0", 4 * dim, dim)
    keys.linear(f"{source}.mlp.3", f"{target}.mlp.2", dim, 4 * dim)
