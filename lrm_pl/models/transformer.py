"""The image-to-triplane transformer (LRM, section 3.2 and figure 2).

Triplane tokens (B, L, D) cross-attend to image features (B, N, M). The camera embedding (B, E) modulates every layer
norm.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.modulated_norm import modulated_norm
from lrm_pl.models.attention import Attention

#: Design of the transformer blocks. "lrm" has cross-attention, self-attention and a GELU MLP in each block, and a layer
#: norm after the last block (LRM, OpenLRM). "triposr" has self-attention, cross-attention and a GEGLU MLP in each
#: block, biases on the attention outputs, a group norm and a projection before the blocks, and a projection and a
#: residual connection after the blocks (Transformer1D of TripoSR).
BlockDesign = Literal["lrm", "triposr"]


class ScaledLayerNorm(nn.LayerNorm):
    """Layer norm with a scale and shift per object.

    If gradients are enabled, scale and shift are merged into weight and bias, so that ``x`` is the only large tensor
    that is saved for the backward pass. The norm is a separate module because ZeRO-3 gathers the parameters of a module
    before its forward pass.
    """

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B L D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B L D"]:
        """Compute LN(x) (1 + scale) + shift."""
        if not torch.is_grad_enabled():
            # Published implementations use this order of operations, and large weights amplify rounding errors.
            return super().forward(x) * (1 + scale).unsqueeze(1) + shift.unsqueeze(1)
        weight, bias = self.weight * (1 + scale), self.bias * (1 + scale) + shift
        return modulated_norm(x, weight, bias, self.eps)


class ModLN(nn.Module):
    """Layer norm that is modulated by the camera embedding c (adaLN of DiT).

    The output is LN(x) (1 + scale) + shift, where (shift, scale) = Linear(SiLU(c)).

    Args:
        dim: Width D of the tokens.
        camera_dim: Width E of the camera embedding. If None, the module is a plain layer norm.
        eps: Epsilon added to the variance.
    """

    def __init__(self, dim: int, camera_dim: int | None, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = (nn.LayerNorm if camera_dim is None else ScaledLayerNorm)(dim, eps=eps)
        if camera_dim is not None:
            linear = nn.Linear(camera_dim, 2 * dim)
            nn.init.zeros_(linear.weight)  # the module is initialized as a plain layer norm
            nn.init.zeros_(linear.bias)
            self.modulation = nn.Sequential(nn.SiLU(), linear)

    def forward(
        self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Normalize tokens, and modulate them if a camera embedding is given."""
        if camera is None:
            return self.norm(x)
        shift, scale = self.modulation(camera).float().chunk(2, dim=-1)  # each (B, D)
        return self.norm(x, shift, scale)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020).

    The output is a * GELU(b), where (a, b) = Linear(x).

    Args:
        dim: Width of the input.
        hidden: Width of the output.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L hidden"]:
        """Project the input, and multiply one half of the projection by the GELU of the other half."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Block(nn.Module):
    """Transformer block with cross-attention to the image, self-attention and an MLP.

    Each sublayer is pre-normalized and has a residual connection.

    Args:
        dim: Width D of the tokens.
        heads: Number of attention heads.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding. If None, the block is not conditioned on the camera.
        design: Order of the sublayers and type of the MLP.
        qk_norm: Whether queries and keys are normalized.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        image_dim: int,
        camera_dim: int | None,
        design: BlockDesign = "lrm",
        *,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.self_first = triposr = design == "triposr"
        eps, hidden = (1e-5 if triposr else 1e-6), 4 * dim
        self.cross_norm = ModLN(dim, camera_dim, eps)
        self.cross_attention = Attention(dim, heads, image_dim, out_bias=triposr, qk_norm=qk_norm)
        self.self_norm = ModLN(dim, camera_dim, eps)
        self.self_attention = Attention(dim, heads, out_bias=triposr, qk_norm=qk_norm)
        self.mlp_norm = ModLN(dim, camera_dim, eps)
        entry = (GEGLU(dim, hidden), nn.Identity()) if triposr else (nn.Linear(dim, hidden), nn.GELU())
        self.mlp = nn.Sequential(*entry, nn.Linear(hidden, dim))

    def forward(
        self, x: Float[Tensor, "B L D"], image: Float[Tensor, "B N M"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Apply the three residual sublayers."""
        if self.self_first:
            x = x + self.self_attention(self.self_norm(x, camera))
        x = x + self.cross_attention(self.cross_norm(x, camera), image)
        if not self.self_first:
            x = x + self.self_attention(self.self_norm(x, camera))
        return x + self.mlp_step(x, camera)

    def mlp_step(
        self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Apply the norm and the MLP.

        ``training.parallelize`` wraps this method to checkpoint its activations.
        """
        return self.mlp(self.mlp_norm(x, camera))


class TriplaneTransformer(nn.Module):
    """Transformer over learnable triplane tokens.

    Args:
        tokens: Number L of triplane tokens.
        dim: Width D of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads per block.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding. If None, the transformer is not conditioned on the camera.
        design: Design of the blocks and of the layers before and after the blocks.
        qk_norm: Whether queries and keys are normalized.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        depth: int,
        heads: int,
        image_dim: int,
        camera_dim: int | None,
        design: BlockDesign = "lrm",
        *,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if design == "triposr" and dim % 32:
            raise InputError(expected="a width divisible by 32 if blocks is 'triposr'", found=dim)
        self.design = design
        self.tokens = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        self.blocks = nn.ModuleList(
            Block(dim, heads, image_dim, camera_dim, design, qk_norm=qk_norm) for _ in range(depth)
        )
        if design == "triposr":
            self.norm: nn.Module = nn.GroupNorm(32, dim, eps=1e-6)
            self.proj_in, self.proj_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        else:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialize()

    def forward(
        self, image: Float[Tensor, "B N M"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Map image features and camera embeddings to triplane tokens."""
        tokens = x = self.tokens.expand(image.shape[0], -1, -1)
        if self.design == "triposr":
            x = self.proj_in(self.norm(x.transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            x = block(x, image, camera)
        return tokens + self.proj_out(x) if self.design == "triposr" else self.norm(x)

    def _initialize(self) -> None:
        residuals = 3 * len(self.blocks)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2 and "modulation" not in name:
                # The variance of weights is 1 / fan-in. The standard deviation of layers that add to the residual
                # stream is divided by the square root of the number of residual additions (GPT-2).
                scale = residuals**-0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                nn.init.trunc_normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.design == "triposr":
            for layer in (self.proj_in, self.proj_out):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
