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

from lrm_pl.weights.key_map import Conversion, Hyperparameters, KeyMapper, default_heads, patch_sides

#: Half side length of the bounding box in TripoSR's scene units.
RADIUS = 0.87

_PATCH = 16

#: Maps the width of an encoder to the name in timm, the depth and the number of heads.
_ENCODERS = {384: ("vit_small_patch16_224.dino", 12, 6), 768: ("vit_base_patch16_224.dino", 12, 12)}


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
        ConversionError: A tensor is missing, unexpected or invalid, or a hyperparameter must be given.
    """
    keys = KeyMapper("TripoSR", state)
    side = keys.shape_of("tokenizer.embeddings", 4)[2]
    dim = keys.shape_of("backbone.proj_in.weight", 2)[0]
    encoder_dim = keys.shape_of("image_tokenizer.model.embeddings.cls_token", 3)[2]
    channels, upsample = keys.shape_of("post_processor.upsample.weight", 4)[1:3]
    width = keys.shape_of("decoder.layers.0.weight", 2)[0]
    depth = keys.count("backbone.transformer_blocks.{}.norm1.weight")
    encoder_depth = keys.count("image_tokenizer.model.encoder.layer.{}.layernorm_before.weight")
    layers = keys.count("decoder.layers.{}.weight", step=2)
    image_size, samples = hyperparameters.image_size or 512, hyperparameters.samples_per_ray or 128
    heads = default_heads(dim, hyperparameters.heads, "--heads", keys.source)
    encoder_heads = default_heads(encoder_dim, hyperparameters.encoder_heads, "--encoder-heads", keys.source)

    _encoder(keys, encoder_dim, encoder_depth, image_size)
    tokens = keys.take("tokenizer.embeddings", (3, dim, side, side))
    tokens = tokens.permute(0, 2, 3, 1).reshape(1, 3 * side * side, dim) if keys.is_valid else tokens
    keys.put("transformer.tokens", tokens, ("tokenizer.embeddings",), "channels last, flattened")
    keys.norm("backbone.norm", "transformer.norm", dim)
    for projection in ("proj_in", "proj_out"):
        keys.linear(f"backbone.{projection}", f"transformer.{projection}", dim, dim)
    for number in range(depth):
        _block(keys, number, dim, encoder_dim)
    keys.copy(
        "post_processor.upsample.weight",
        "upsampler.deconvolution.weight",
        (dim, channels, upsample, upsample),
    )
    keys.copy("post_processor.upsample.bias", "upsampler.deconvolution.bias", (channels,))
    keys.decoder("decoder.layers", channels, width, layers)
    keys.finish()

    name, usual_depth, usual_heads = _ENCODERS.get(encoder_dim, (_ENCODERS[768][0], 0, 0))
    usual = encoder_dim in _ENCODERS and (encoder_depth, encoder_heads) == (usual_depth, usual_heads)
    sizes_of_encoder = {"dim": encoder_dim, "depth": encoder_depth, "heads": encoder_heads}
    encoder = {
        "name": name, "image_size": image_size, "frozen": False, "norm_eps": 1e-12,
        **({} if usual else sizes_of_encoder),
    }  # fmt: skip
    decoder = {
        "channels": channels, "width": width, "layers": layers, "activation": "silu",
        "density_activation": "exp", "density_bias": -1.0, "color_margin": 0.0,
    }  # fmt: skip
    lrm = {
        "encoder": encoder, "decoder": decoder, "dim": dim, "depth": depth, "heads": heads, "camera": None,
        "plane_tokens": side, "upsample": upsample, "blocks": "triposr", "plane_layout": "triposr",
    }  # fmt: skip
    renderer = {"samples_per_ray": samples, "bounds": "box", "unit": "chord"}
    return Conversion({"lrm": lrm, "renderer": renderer}, keys.weights, keys.report)


def _encoder(keys: KeyMapper, dim: int, depth: int, image_size: int) -> None:
    source, target = "image_tokenizer.model", "encoder.vit"
    patch = f"{source}.embeddings.patch_embeddings.projection"
    keys.copy(f"{patch}.weight", f"{target}.patch_embed.proj.weight", (dim, 3, _PATCH, _PATCH))
    keys.copy(f"{patch}.bias", f"{target}.patch_embed.proj.bias", (dim,))
    keys.copy(f"{source}.embeddings.cls_token", f"{target}.cls_token", (1, 1, dim))
    name = f"{source}.embeddings.position_embeddings"
    stored, patches = patch_sides(keys.shape_of(name, 3)[1], image_size, _PATCH, keys.source)
    positions = keys.take(name, (1, 1 + stored * stored, dim))
    positions = _resize_positions(positions, stored, patches) if keys.is_valid else positions
    keys.put(f"{target}.pos_embed", positions, (name,), f"{stored} -> {patches}")
    for number in range(depth):
        layer, block = f"{source}.encoder.layer.{number}", f"{target}.blocks.{number}"
        keys.norm(f"{layer}.layernorm_before", f"{block}.norm1", dim)
        keys.norm(f"{layer}.layernorm_after", f"{block}.norm2", dim)
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            parts = tuple(f"{layer}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
            keys.concatenate(parts, f"{block}.attn.qkv.{kind}", shape)
        keys.linear(f"{layer}.attention.output.dense", f"{block}.attn.proj", dim, dim)
        keys.linear(f"{layer}.intermediate.dense", f"{block}.mlp.fc1", 4 * dim, dim)
        keys.linear(f"{layer}.output.dense", f"{block}.mlp.fc2", dim, 4 * dim)
    keys.norm(f"{source}.layernorm", f"{target}.norm", dim)
    for kind in ("weight", "bias"):
        keys.ignore(f"{source}.pooler.dense.{kind}", "the pooled output is not used")


def _resize_positions(positions: Tensor, stored: int, side: int) -> Tensor:
    """Resize position embeddings of shape (1, 1 + n * n, M) to (1, 1 + side * side, M), as in transformers 4.35."""
    if stored == side:
        return positions
    grid = positions[:, 1:].view(1, stored, stored, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / stored
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    assert grid.shape[-2:] == (side, side), grid.shape
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _block(keys: KeyMapper, number: int, dim: int, image_dim: int) -> None:
    source, target = f"backbone.transformer_blocks.{number}", f"transformer.blocks.{number}"
    for norm, name in (("norm1", "self_norm"), ("norm2", "cross_norm"), ("norm3", "mlp_norm")):
        keys.norm(f"{source}.{norm}", f"{target}.{name}.norm", dim)
    parts = tuple(f"{source}.attn1.to_{part}.weight" for part in "qkv")
    keys.concatenate(parts, f"{target}.self_attention.qkv.weight", (dim, dim))
    keys.linear(f"{source}.attn1.to_out.0", f"{target}.self_attention.out", dim, dim)
    keys.copy(f"{source}.attn2.to_q.weight", f"{target}.cross_attention.q.weight", (dim, dim))
    parts = tuple(f"{source}.attn2.to_{part}.weight" for part in "kv")
    keys.concatenate(parts, f"{target}.cross_attention.kv.weight", (dim, image_dim))
    keys.linear(f"{source}.attn2.to_out.0", f"{target}.cross_attention.out", dim, dim)
    keys.linear(f"{source}.ff.net.0.proj", f"{target}.mlp.0.proj", 8 * dim, dim)
    keys.linear(f"{source}.ff.net.2", f"{target}.mlp.2", dim, 4 * dim)
