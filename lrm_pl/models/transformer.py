"""The image-to-triplane transformer: blocks of cross-attention, self-attention, MLP, modulated by the camera.

LRM, section 3.2 and figure 2. Tokens (B, L, D) ask the image features (B, N, M); the camera embedding (B, E)
modulates every normalization.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.modulated_norm import modulated_norm
from lrm_pl.models.attention import Attention

#: "lrm": cross-attention, self-attention, GELU MLP; a layer norm at the end of the stack (LRM, OpenLRM). "triposr":
#: self-attention, cross-attention, GEGLU MLP, biases on attention outputs; a group norm and a projection before the
#: stack, a projection and a residual around all of it behind (TripoSR's Transformer1D).
BlockDesign = Literal["lrm", "triposr"]


class ScaledLayerNorm(nn.LayerNorm):
    """Layer norm whose output is scaled and shifted once more, object by object.

    Where gradients are wanted it is one norm whose weights and biases are the modulated ones: the same function, but
    nothing of the size of x is kept for backward besides x. A module of its own, so that sharding sees its weights
    being used.
    """

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B L D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B L D"]:
        """Compute LN(x) (1 + scale) + shift."""
        if not torch.is_grad_enabled():
            # In the order in which those computed it whose weights these may be: rounding grows with large weights.
            return super().forward(x) * (1 + scale).unsqueeze(1) + shift.unsqueeze(1)
        weight, bias = self.weight * (1 + scale), self.bias * (1 + scale) + shift
        return modulated_norm(x, weight, bias, self.eps)


class ModLN(nn.Module):
    """Layer norm modulated by the camera: LN(x) (1 + scale) + shift, (shift, scale) = Linear(SiLU(c)) (DiT's adaLN).

    Args:
        dim: Width D of the tokens.
        camera_dim: Width E of the camera embedding; None makes it a plain layer norm.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, camera_dim: int | None, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = (nn.LayerNorm if camera_dim is None else ScaledLayerNorm)(dim, eps=eps)
        if camera_dim is not None:
            linear = nn.Linear(camera_dim, 2 * dim)
            nn.init.zeros_(linear.weight)  # it begins as a plain layer norm
            nn.init.zeros_(linear.bias)
            self.modulation = nn.Sequential(nn.SiLU(), linear)

    def forward(
        self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Normalize, and modulate where there is a camera."""
        if camera is None:
            return self.norm(x)
        shift, scale = self.modulation(camera).float().chunk(2, dim=-1)  # each (B, D)
        return self.norm(x, shift, scale)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other: a GELU(b) (Shazeer 2020).

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
    """Cross-attention to the image, self-attention over the triplane, MLP; each a residual behind a ModLN.

    Args:
        dim: Width D of the tokens.
        heads: Attention heads.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding; None without one.
        design: The order of the steps and the kind of the MLP.
        qk_norm: Whether queries and keys are normalized.
        mlp_ratio: Hidden width of the MLP in units of D.
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
        """Run the three residual steps."""
        if self.self_first:
            x = x + self.self_attention(self.self_norm(x, camera))
        x = x + self.cross_attention(self.cross_norm(x, camera), image)
        if not self.self_first:
            x = x + self.self_attention(self.self_norm(x, camera))
        return x + self.mlp_step(x, camera)

    def mlp_step(
        self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"] | None
    ) -> Float[Tensor, "B L D"]:
        """Norm and MLP: what may be computed again in backward for little (``training.parallel``)."""
        return self.mlp(self.mlp_norm(x, camera))


class TriplaneTransformer(nn.Module):
    """A stack of blocks over learnable triplane tokens, and what stands before and behind it.

    Args:
        tokens: Number L of triplane tokens.
        dim: Width D.
        depth: Number of blocks.
        heads: Attention heads a block.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding; None without one.
        design: Kind of the blocks and of what surrounds them.
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
            raise InputError(expected="a width that 32 groups divide with blocks 'triposr'", found=dim)
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
        """Turn image features and camera embeddings into triplane tokens."""
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
                # Variance 1 / inputs keeps the scale at any width; what adds to the residual stream is
                # divided by the number of additions (GPT-2's rule), so that depth keeps it too.
                scale = residuals**-0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                nn.init.trunc_normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.design == "triposr":
            for layer in (self.proj_in, self.proj_out):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
