"""TripoSR (VAST-AI-Research/TripoSR) -> ours, and where it goes what is unlike ours there.

- Its world: the input view is seen from +x and the box has the radius 0.87. Ours has it seen from -y, and the box
  [-1, 1]^3: ``plane_layout`` turns it, and one of our scene units is 0.87 of its (``from_triposr_world``). An object
  normalized to the unit sphere then has the size that it was trained with.
- Density counts lengths in shares of a ray's chord (``Renderer.unit``), so it does not change with the scale.
- Position embeddings are resized by transformers 4.35's rule: bicubic, by a factor of (side + 0.1) / stored side.
- Blocks are self-attention, cross-attention, GEGLU, in a group norm, two projections and a residual: ``blocks``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.weights.key_map import Conversion, KeyMapper, UnseenNumbers, default_heads, patch_sides

#: Half the side of TripoSR's box, in its scene units.
RADIUS = 0.87

_PATCH = 16

#: timm's encoders: width -> name, blocks, heads.
_ENCODERS = {384: ("vit_small_patch16_224.dino", 12, 6), 768: ("vit_base_patch16_224.dino", 12, 12)}


def from_triposr_world(c2w: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Bring OpenCV poses in TripoSR's world into ours: a quarter turn about +z, lengths divided by 0.87."""
    turn = c2w.new_tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    rotation, center = turn @ c2w[..., :3, :3], turn @ c2w[..., :3, 3:] / RADIUS
    return torch.cat([torch.cat([rotation, center], dim=-1), c2w[..., 3:, :]], dim=-2)


def convert_triposr(state: Mapping[Any, Any], unseen: UnseenNumbers = UnseenNumbers()) -> Conversion:  # noqa: B008 - frozen
    """Convert TripoSR's state dict, sizes read off the tensors.

    Raises:
        ConversionError: Another network, missing or strange keys, wrong shapes, or a size that must be given.
    """
    keys = KeyMapper("TripoSR", state)
    side = keys.shape("tokenizer.embeddings", 4)[2]
    dim = keys.shape("backbone.proj_in.weight", 2)[0]
    encoder_dim = keys.shape("image_tokenizer.model.embeddings.cls_token", 3)[2]
    channels, upsample = keys.shape("post_processor.upsample.weight", 4)[1:3]
    width = keys.shape("decoder.layers.0.weight", 2)[0]
    depth = keys.count("backbone.transformer_blocks.{}.norm1.weight")
    encoder_depth = keys.count("image_tokenizer.model.encoder.layer.{}.layernorm_before.weight")
    layers = keys.count("decoder.layers.{}.weight", step=2)
    image_size, samples = unseen.image_size or 512, unseen.samples_per_ray or 128
    heads = default_heads(dim, unseen.heads, "--heads", keys.source)
    encoder_heads = default_heads(encoder_dim, unseen.encoder_heads, "--encoder-heads", keys.source)

    _encoder(keys, encoder_dim, encoder_depth, image_size)
    tokens = keys.take("tokenizer.embeddings", (3, dim, side, side))
    tokens = tokens.permute(0, 2, 3, 1).reshape(1, 3 * side * side, dim) if keys.sound else tokens
    keys.put("transformer.tokens", tokens, ("tokenizer.embeddings",), "channels last, in one row")
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
    theirs, ours = "image_tokenizer.model", "encoder.vit"
    patch = f"{theirs}.embeddings.patch_embeddings.projection"
    keys.copy(f"{patch}.weight", f"{ours}.patch_embed.proj.weight", (dim, 3, _PATCH, _PATCH))
    keys.copy(f"{patch}.bias", f"{ours}.patch_embed.proj.bias", (dim,))
    keys.copy(f"{theirs}.embeddings.cls_token", f"{ours}.cls_token", (1, 1, dim))
    name = f"{theirs}.embeddings.position_embeddings"
    stored, patches = patch_sides(keys.shape(name, 3)[1], image_size, _PATCH, keys.source)
    positions = keys.take(name, (1, 1 + stored * stored, dim))
    positions = _resized(positions, stored, patches) if keys.sound else positions
    keys.put(f"{ours}.pos_embed", positions, (name,), f"{stored} -> {patches}")
    for number in range(depth):
        layer, block = f"{theirs}.encoder.layer.{number}", f"{ours}.blocks.{number}"
        keys.norm(f"{layer}.layernorm_before", f"{block}.norm1", dim)
        keys.norm(f"{layer}.layernorm_after", f"{block}.norm2", dim)
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            parts = tuple(f"{layer}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
            keys.stacked(parts, f"{block}.attn.qkv.{kind}", shape)
        keys.linear(f"{layer}.attention.output.dense", f"{block}.attn.proj", dim, dim)
        keys.linear(f"{layer}.intermediate.dense", f"{block}.mlp.fc1", 4 * dim, dim)
        keys.linear(f"{layer}.output.dense", f"{block}.mlp.fc2", dim, 4 * dim)
    keys.norm(f"{theirs}.layernorm", f"{ours}.norm", dim)
    for kind in ("weight", "bias"):
        keys.leave_out(f"{theirs}.pooler.dense.{kind}", "the tokens are used, not what is pooled of them")


def _resized(positions: Tensor, stored: int, side: int) -> Tensor:
    """Resize (1, 1 + n n, M) to (1, 1 + side side, M) as transformers 4.35 does."""
    if stored == side:
        return positions
    grid = positions[:, 1:].view(1, stored, stored, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / stored
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    assert grid.shape[-2:] == (side, side), grid.shape
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _block(keys: KeyMapper, number: int, dim: int, image_dim: int) -> None:
    theirs, ours = f"backbone.transformer_blocks.{number}", f"transformer.blocks.{number}"
    for norm, name in (("norm1", "self_norm"), ("norm2", "cross_norm"), ("norm3", "mlp_norm")):
        keys.norm(f"{theirs}.{norm}", f"{ours}.{name}.norm", dim)
    parts = tuple(f"{theirs}.attn1.to_{part}.weight" for part in "qkv")
    keys.stacked(parts, f"{ours}.self_attention.qkv.weight", (dim, dim))
    keys.linear(f"{theirs}.attn1.to_out.0", f"{ours}.self_attention.out", dim, dim)
    keys.copy(f"{theirs}.attn2.to_q.weight", f"{ours}.cross_attention.q.weight", (dim, dim))
    parts = tuple(f"{theirs}.attn2.to_{part}.weight" for part in "kv")
    keys.stacked(parts, f"{ours}.cross_attention.kv.weight", (dim, image_dim))
    keys.linear(f"{theirs}.attn2.to_out.0", f"{ours}.cross_attention.out", dim, dim)
    keys.linear(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.0.proj", 8 * dim, dim)
    keys.linear(f"{theirs}.ff.net.2", f"{ours}.mlp.2", dim, 4 * dim)
