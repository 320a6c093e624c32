"""Conversion of weights of TripoSR (VAST-AI-Research/TripoSR).

TripoSR differs from this project in the following ways:

- The input camera is on the +x axis and the bounding box is [-0.87, 0.87]^3. In this project, the camera is on the -y
  axis and the box is [-1, 1]^3. ``plane_layout`` rotates the planes, and ``from_triposr_world`` converts poses. One
  scene unit corresponds to 0.87 units of TripoSR, so that an object that fits the unit sphere has the same size as in
  TripoSR's training.
- Distances between samples are divided by the length of the ray inside the bounding box, so densities do not depend on
  the scale. This is configured by the option ``unit`` of ``Renderer``.
- Position embeddings are resized as in transformers 4.35, with bicubic interpolation and a scale factor of
  (side + 0.1) / stored side.
- Blocks consist of self-attention, cross-attention and GEGLU, and the transformer begins with a group norm and a
  projection and ends with a projection. This is configured by the option ``blocks`` of ``LRM``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.weights.key_map import (
    Conversion,
    Hyperparameters,
    KeyMapper,
    Rules,
    decoder_rules,
    default_heads,
    meta_network,
    square_side,
)

#: Half side length of the bounding box in TripoSR's scene units.
RADIUS = 0.87

_PATCH = 16

#: Maps the width of the encoder to the name in timm.
_ENCODERS = {384: "vit_small_patch16_224.dino", 768: "vit_base_patch16_224.dino"}

_VIT, _BLOCK = r"encoder\.vit\.blocks\.(\d+)", r"transformer\.blocks\.(\d+)"
_VIT_LAYER, _LAYER = r"image_tokenizer.model.encoder.layer.\1", r"backbone.transformer_blocks.\1"
_RULES: Rules = {
    r"encoder\.vit\.patch_embed\.proj\.(.+)": (
        r"image_tokenizer.model.embeddings.patch_embeddings.projection.\1",
    ),
    r"encoder\.vit\.cls_token": ("image_tokenizer.model.embeddings.cls_token",),
    rf"{_VIT}\.norm1\.(.+)": (rf"{_VIT_LAYER}.layernorm_before.\2",),
    rf"{_VIT}\.norm2\.(.+)": (rf"{_VIT_LAYER}.layernorm_after.\2",),
    rf"{_VIT}\.attn\.qkv\.(.+)": tuple(
        rf"{_VIT_LAYER}.attention.attention.{part}.\2" for part in ("query", "key", "value")
    ),
    rf"{_VIT}\.attn\.proj\.(.+)": (rf"{_VIT_LAYER}.attention.output.dense.\2",),
    rf"{_VIT}\.mlp\.fc1\.(.+)": (rf"{_VIT_LAYER}.intermediate.dense.\2",),
    rf"{_VIT}\.mlp\.fc2\.(.+)": (rf"{_VIT_LAYER}.output.dense.\2",),
    r"encoder\.vit\.norm\.(.+)": (r"image_tokenizer.model.layernorm.\1",),
    r"transformer\.(norm|proj_in|proj_out)\.(.+)": (r"backbone.\1.\2",),
    rf"{_BLOCK}\.self_norm\.norm\.(.+)": (rf"{_LAYER}.norm1.\2",),
    rf"{_BLOCK}\.cross_norm\.norm\.(.+)": (rf"{_LAYER}.norm2.\2",),
    rf"{_BLOCK}\.mlp_norm\.norm\.(.+)": (rf"{_LAYER}.norm3.\2",),
    rf"{_BLOCK}\.self_attention\.qkv\.weight": tuple(rf"{_LAYER}.attn1.to_{part}.weight" for part in "qkv"),
    rf"{_BLOCK}\.self_attention\.out\.(.+)": (rf"{_LAYER}.attn1.to_out.0.\2",),
    rf"{_BLOCK}\.cross_attention\.q\.weight": (rf"{_LAYER}.attn2.to_q.weight",),
    rf"{_BLOCK}\.cross_attention\.kv\.weight": tuple(rf"{_LAYER}.attn2.to_{part}.weight" for part in "kv"),
    rf"{_BLOCK}\.cross_attention\.out\.(.+)": (rf"{_LAYER}.attn2.to_out.0.\2",),
    rf"{_BLOCK}\.mlp\.(.+)": (rf"{_LAYER}.ff.net.\2",),
    r"upsampler\.deconvolution\.(.+)": (r"post_processor.upsample.\1",),
}


def from_triposr_world(c2w: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Convert OpenCV camera-to-world matrices from the coordinates of TripoSR to the coordinates of this project.

    Poses are rotated by -90 degrees about the z axis, and lengths are divided by 0.87.
    """
    turn = c2w.new_tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    rotation, center = turn @ c2w[..., :3, :3], turn @ c2w[..., :3, 3:] / RADIUS
    return torch.cat([torch.cat([rotation, center], dim=-1), c2w[..., 3:, :]], dim=-2)


def convert_triposr(
    state: Mapping[Any, Any],
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008 - frozen
) -> Conversion:
    """Convert a state dict of TripoSR. Sizes are determined from the tensors.

    Args:
        state: State dict of TripoSR.
        hyperparameters: Hyperparameters that cannot be determined from the tensors.

    Raises:
        ConversionError: A tensor is missing, unexpected or invalid, or a number of heads does not divide the width.
    """
    keys = KeyMapper("TripoSR", state)
    side = keys.shape_of("tokenizer.embeddings", 4)[2]
    dim = keys.shape_of("backbone.proj_in.weight", 2)[0]
    encoder_dim = keys.shape_of("image_tokenizer.model.embeddings.cls_token", 3)[2]
    channels, upsample = keys.shape_of("post_processor.upsample.weight", 4)[1:3]
    width = keys.shape_of("decoder.layers.0.weight", 2)[0]
    layers = keys.count("decoder.layers.{}.weight", step=2)
    image_size = hyperparameters.image_size or 512
    encoder = {
        "name": _ENCODERS.get(encoder_dim, _ENCODERS[768]), "image_size": image_size, "frozen": False,
        "norm_eps": 1e-12, "dim": encoder_dim,
        "depth": keys.count("image_tokenizer.model.encoder.layer.{}.layernorm_before.weight"),
        "heads": default_heads(encoder_dim, hyperparameters.encoder_heads, "--encoder-heads", keys.source),
    }  # fmt: skip
    decoder = {
        "channels": channels, "width": width, "layers": layers, "activation": "silu",
        "density_activation": "exp", "density_bias": -1.0, "color_margin": 0.0,
    }  # fmt: skip
    lrm = {
        "encoder": encoder, "decoder": decoder, "dim": dim,
        "depth": keys.count("backbone.transformer_blocks.{}.norm1.weight"),
        "heads": default_heads(dim, hyperparameters.heads, "--heads", keys.source), "camera": None,
        "plane_tokens": side, "upsample": upsample, "blocks": "triposr", "plane_layout": "triposr",
    }  # fmt: skip
    renderer = {"samples_per_ray": hyperparameters.samples_per_ray or 128, "bounds": "box", "unit": "chord"}
    network = meta_network(lrm)

    name = "image_tokenizer.model.embeddings.position_embeddings"
    number = keys.shape_of(name, 3)[1] - 1
    stored = square_side(number, "a square of patches and a class token", keys.source)
    positions = keys.take(name, (1, 1 + number, encoder_dim))
    patches = image_size // _PATCH
    positions = _resize_positions(positions, stored, patches) if keys.is_valid else positions
    keys.put("encoder.vit.pos_embed", positions, (name,), f"{stored} -> {patches}")
    tokens = keys.take("tokenizer.embeddings", (3, dim, side, side))
    tokens = tokens.permute(0, 2, 3, 1).reshape(1, 3 * side * side, dim) if keys.is_valid else tokens
    keys.put("transformer.tokens", tokens, ("tokenizer.embeddings",), "channels last, flattened")
    keys.ignore("image_tokenizer.model.pooler.dense.", "the pooled output is not used")
    keys.map(network, _RULES | decoder_rules("decoder.layers", layers))
    return Conversion({"lrm": lrm, "renderer": renderer}, keys.weights, keys.report)


def _resize_positions(positions: Tensor, stored: int, side: int) -> Tensor:
    """Resize position embeddings of shape (1, 1 + n * n, M) to (1, 1 + side * side, M), as in transformers 4.35."""
    if stored == side:
        return positions
    grid = positions[:, 1:].view(1, stored, stored, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / stored
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    assert grid.shape[-2:] == (side, side), grid.shape
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
