"""The image encoder: a timm DINO, DINOv2 or DINOv3 vision transformer, all of its tokens (LRM, section 3.1)."""

import difflib
import sys
from functools import partial
from typing import Any, Literal, final

import timm
import torch
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError

#: Which tokens a network hands on: all of them, or without the registers (OpenLRM drops these).
EncoderTokens = Literal["all", "class_and_patches"]


@final
class ImageEncoder(nn.Module):
    """A vision transformer that returns its tokens: class, registers if any, patches.

    It owns the resizing of images to its own size, their normalization, and its position embeddings, which timm
    makes for ``image_size`` (weights stored for another size are resized when they are loaded).

    Args:
        name: timm's name of the network. ``vit_base_patch16_224.dino`` is the paper's (DINO);
            ``vit_small_patch14_dinov2`` is DINOv2, ``vit_small_patch14_reg4_dinov2`` DINOv2 with registers,
            ``vit_small_patch16_dinov3`` DINOv3.
        image_size: Side of the square image that the network sees, a multiple of its patch size.
        frozen: Whether its weights stay as they are: no gradients, no optimizer state.
        normalize: Whether images are normalized with the network's own mean and deviation; OpenLRM's weights were
            trained on plain [0, 1].
        tokens: Which tokens are handed on.
        norm_eps: Added to the variance in layer norms; None is the network's own (the weights of TripoSR: 1e-12).
        dim: Width, where it is not the one that the name says; for networks of one's own.
        depth: Number of blocks, likewise.
        heads: Attention heads, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "vit_base_patch16_224.dino",
        image_size: int = 512,
        *,
        frozen: bool = False,
        normalize: bool = True,
        tokens: EncoderTokens = "all",
        norm_eps: float | None = None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.frozen, self.tokens = name, image_size, frozen, tokens
        if not timm.is_model(name):
            close = ", ".join(
                difflib.get_close_matches(name, timm.list_models(name.split("_")[0] + "_*"), n=3)
            )
            raise InputError(
                expected="an encoder that timm knows",
                found=f"{name!r}",
                remedy=f"close to it: {close or 'none'}",
            )
        sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads}
        options: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
        if norm_eps is not None:
            options["norm_layer"] = partial(nn.LayerNorm, eps=norm_eps)
        try:
            self.vit = timm.create_model(
                name, pretrained=False, img_size=image_size, num_classes=0, **options
            )
        except (TypeError, AssertionError, ZeroDivisionError) as error:
            raise InputError(
                subject=name,
                expected="a plain vision transformer of sizes that go together",
                found=f"{sizes}: {error}",
            ) from error
        if not isinstance(self.vit, VisionTransformer | Eva):
            raise InputError(
                subject=name, expected="a plain vision transformer", found=type(self.vit).__name__
            )
        patch = self.vit.patch_embed.patch_size[0]
        if image_size % patch:
            raise InputError(
                subject=name, expected=f"an image_size that is a multiple of {patch}", found=image_size
            )
        self.dim: int = self.vit.embed_dim
        config = self.vit.pretrained_cfg
        mean, std = (config["mean"], config["std"]) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if frozen:
            self.vit.requires_grad_(False)
        #: Whether weights were loaded; random ones are there before.
        self.has_weights = False
        self.register_load_state_dict_post_hook(_note_weights)  # type: ignore[no-untyped-call]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N M"]:
        """Turn sRGB images in [0, 1] of any square size into tokens."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.vit.forward_features((images - self.mean) / self.std)
        if self.tokens == "class_and_patches":
            tokens = torch.cat([tokens[:, :1], tokens[:, self.vit.num_prefix_tokens :]], dim=1)
        return tokens

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Load weights in timm's names or in their authors', strictly; position embeddings are resized.

        Raises:
            InputError: Keys or shapes differ.
        """
        convert = sys.modules[type(self.vit).__module__].checkpoint_filter_fn
        try:
            self.vit.load_state_dict(convert(dict(state), self.vit), strict=True)
        except (RuntimeError, KeyError) as error:
            raise InputError(
                expected=f"the weights of {self.name}",
                found=f"others: {error}",
                remedy="give the file of this network",
            ) from error
        self.has_weights = True


def _note_weights(encoder: nn.Module, _: object) -> None:
    assert isinstance(encoder, ImageEncoder)
    encoder.has_weights = True
