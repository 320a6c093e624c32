"""Image encoder with a DINO, DINOv2 or DINOv3 vision transformer from timm (LRM, section 3.1)."""

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

#: Tokens to return: all tokens, or only the class and patch tokens (OpenLRM).
EncoderTokens = Literal["all", "class_and_patches"]


@final
class ImageEncoder(nn.Module):
    """Vision transformer that returns class, register and patch tokens.

    Images are resized to ``image_size`` and normalized. If pretrained weights were trained with a different image size,
    ``load_pretrained`` resizes the positional embeddings.

    Args:
        name: Name of the model in timm, for example, ``vit_base_patch16_224.dino`` (DINO, used by LRM),
            ``vit_small_patch14_dinov2``, ``vit_small_patch14_reg4_dinov2`` (with register tokens) or
            ``vit_small_patch16_dinov3``.
        image_size: Side of the square input image in pixels, a multiple of the patch size.
        frozen: Whether to exclude the encoder from training.
        normalize: Whether to normalize images with the mean and standard deviation of the model in timm. OpenLRM's
            weights expect images in [0, 1].
        tokens: Tokens to return.
        norm_eps: Epsilon of the layer norms (TripoSR: 1e-12). If None, the default of the model is used.
        dim: Width M of the tokens. If None, the default of the model is used.
        depth: Number of blocks. If None, the default of the model is used.
        heads: Number of attention heads. If None, the default of the model is used.
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
                expected="the name of a timm model",
                found=f"{name!r}",
                remedy=f"Use one of {close}" if close else "List names with timm.list_models()",
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
                subject=name, expected="a vision transformer with consistent sizes", found=f"{sizes}: {error}"
            ) from error
        if not isinstance(self.vit, VisionTransformer | Eva):
            raise InputError(subject=name, expected="a vision transformer", found=type(self.vit).__name__)
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
        #: Whether a state dict has been loaded.
        self.has_weights = False
        self.register_load_state_dict_post_hook(_note_weights)  # type: ignore[no-untyped-call]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N M"]:
        """Encode square sRGB images of any size with values in [0, 1]."""
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
        """Load a state dict strictly, and resize the positional embeddings if necessary.

        Args:
            state: State dict with the keys of timm or of the authors of the model.

        Raises:
            InputError: The keys or shapes do not match the model.
        """
        convert = sys.modules[type(self.vit).__module__].checkpoint_filter_fn
        try:
            self.vit.load_state_dict(convert(dict(state), self.vit), strict=True)
        except (RuntimeError, KeyError) as error:
            raise InputError(
                expected=f"the weights of {self.name}",
                found=f"a state dict that does not match: {error}",
                remedy="use a weight file of this model",
            ) from error
        self.has_weights = True


def _note_weights(encoder: nn.Module, _: object) -> None:
    assert isinstance(encoder, ImageEncoder)
    encoder.has_weights = True
