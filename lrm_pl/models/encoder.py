"""The image encoder: a timm DINO / DINOv2 vision transformer, all of its tokens (LRM, section 3.1)."""

from typing import final

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError


@final
class ImageEncoder(nn.Module):
    """A vision transformer that returns every token: class, registers if any, patches.

    It owns the resizing of images to its own size, their normalisation, and its position embeddings, which timm
    makes for ``image_size`` (weights stored for another size are resized when they are loaded).

    Args:
        name: timm's name of the network; ``vit_base_patch16_224.dino`` is the paper's.
        image_size: Side of the square image that the network sees, a multiple of its patch size.
        frozen: Whether its weights stay as they are: no gradients, no optimiser state.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str = "vit_base_patch16_224.dino", image_size: int = 512, *, frozen: bool = False
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.frozen = name, image_size, frozen
        self.vit = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0)
        patch = self.vit.patch_embed.patch_size[0]
        if image_size % patch:
            raise InputError(
                f"{name}: expected an image_size that is a multiple of {patch}, found {image_size}"
            )
        self.dim: int = self.vit.embed_dim
        config = self.vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        if frozen:
            self.vit.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N M"]:
        """Turn sRGB images in [0, 1] of any square size into tokens."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.vit.forward_features((images - self.mean) / self.std)

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Load weights in timm's names, strictly; position embeddings are resized to this image size.

        Raises:
            RuntimeError: Keys or shapes differ.
        """
        state = dict(state)
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"],
            new_size=list(self.vit.patch_embed.grid_size),
            num_prefix_tokens=self.vit.num_prefix_tokens if not self.vit.no_embed_class else 0,
        )
        self.vit.load_state_dict(state, strict=True)
