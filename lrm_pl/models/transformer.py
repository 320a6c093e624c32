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

#: "lrm": cross-attention, self-attention, GELU MLP; a final layer norm (LRM, OpenLRM). "triposr": self-attention,
#: cross-attention, GEGLU MLP, biases on attention outputs; group norm and projection before the stack, projection and
#: residual connection after it (TripoSR's Transformer1D).
BlockDesign = Literal["lrm", "triposr"]


class ScaledLayerNorm(nn.LayerNorm):
    """Layer norm with a scale and shift per object.

    With gradients, scale and shift are merged into weight and bias, so that x is the only tensor of its size saved for
    backward. A separate module, since ZeRO-3 gathers the parameters of each module before its forward.
    """

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B L D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B L D"]:
        """Compute LN(x) (1 + scale) + shift."""
        if not torch.is_grad_enabled():
            # In the order of the published implementations, whose large weights amplify rounding.
            return super().forward(x) * (1 + scale).unsqueeze(1) + shift.unsqueeze(1)
        weight, bias = self.weight * (1 + scale), self.bias * (1 + scale) + shift
        return modulated_norm(x, weight, bias, self.eps)


class ModLN(nn.Module):
    """Layer norm modulated by the camera: LN(x) (1 + scale) + shift, (shift, scale) = Linear(SiLU(c)) (DiT's adaLN).

    Args:
        dim: Width D of the tokens.
        camera_dim: Width E of the camera embedding; None for a plain layer norm.
        eps: Epsilon added to the variance.
    """

    def __init__(self, dim: int, camera_dim: int | None, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = (nn.LayerNorm if camera_dim is None else ScaledLayerNorm)(dim, eps=eps)
        if camera_dim is not None:
            linear = nn.Linear(camera_dim, 2 * dim)
            nn.init.zeros_(linear.weight)  # initially a plain layer norm
            nn.init.zeros_(linear.bias)
            self.modulation = nn.Sequential(nn.SiLU(), linear)

    def forward(
        self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Normalize, and modulate if a camera embedding is given."""
        if camera is None:
            return self.norm(x)
        shift, scale = self.modulation(camera).float().chunk(2, dim=-1)  # each (B, D)
        return self.norm(x, shift, scale)


class GEGLU(nn.Module):
    """Gated linear unit with GELU: a GELU(b) for (a, b) = Linear(x) (Shazeer 2020).

    Args:
        dim: Width of the input.
        hidden: Width of the output.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L hidden"]:
        """Project and gate."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Block(nn.Module):
    """Transformer block: cross-attention to the image, self-attention and MLP, each residual and pre-normalized.

    Args:
        dim: Width D of the tokens.
        heads: Attention heads.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding; None without camera conditioning.
        design: Order of the sublayers and type of the MLP.
        qk_norm: Whether queries and keys are normalized.
        mlp_ratio: Hidden width of the MLP as a multiple of D.
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
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.self_first = triposr = design == "triposr"
        eps, hidden = (1e-5 if triposr else 1e-6), mlp_ratio * dim
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
        """Apply norm and MLP; separate for activation checkpointing (``training.parallelize``)."""
        return self.mlp(self.mlp_norm(x, camera))


class TriplaneTransformer(nn.Module):
    """Transformer over learnable triplane tokens.

    Args:
        tokens: Number L of triplane tokens.
        dim: Width D.
        depth: Number of blocks.
        heads: Attention heads per block.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding; None without camera conditioning.
        design: Design of the blocks and of the layers around them.
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
            raise InputError(expected="a width divisible by 32 with blocks 'triposr'", found=dim)
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
                # Variance 1 / fan-in; layers that add to the residual stream are scaled down by the square root of
                # the number of residual additions (GPT-2).
                scale = residuals**-0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                nn.init.trunc_normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.design == "triposr":
            for layer in (self.proj_in, self.proj_out):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
