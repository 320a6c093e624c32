"""The image-to-triplane transformer: camera-modulated blocks of cross-attention, self-attention, MLP.

LRM, section 3.2 and figure 2. Tokens (B, L, D) ask the image features (B, N, M); the camera embedding (B, E)
modulates every normalisation.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.models.attention import Attention


class ModLN(nn.Module):
    """Layer norm modulated by the camera: LN(x) (1 + scale) + shift, (shift, scale) = Linear(SiLU(c)) (DiT's adaLN).

    Args:
        dim: Width D of the tokens.
        camera_dim: Width E of the camera embedding.
    """

    def __init__(self, dim: int, camera_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(camera_dim, 2 * dim))

    def forward(self, x: Float[Tensor, "B L D"], camera: Float[Tensor, "B E"]) -> Float[Tensor, "B L D"]:
        """Normalise and modulate."""
        shift, scale = self.modulation(camera).unsqueeze(1).chunk(2, dim=-1)  # each (B, 1, D)
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Cross-attention to the image, self-attention over the triplane, MLP; each a residual behind a ModLN.

    Args:
        dim: Width D of the tokens.
        heads: Attention heads.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding.
        mlp_ratio: Hidden width of the MLP in units of D.
    """

    def __init__(self, dim: int, heads: int, image_dim: int, camera_dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.cross_norm = ModLN(dim, camera_dim)
        self.cross_attention = Attention(dim, heads, context_dim=image_dim)
        self.self_norm = ModLN(dim, camera_dim)
        self.self_attention = Attention(dim, heads)
        self.mlp_norm = ModLN(dim, camera_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(
        self, x: Float[Tensor, "B L D"], image: Float[Tensor, "B N M"], camera: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B L D"]:
        """Run the three residual steps."""
        x = x + self.cross_attention(self.cross_norm(x, camera), image)
        x = x + self.self_attention(self.self_norm(x, camera))
        return x + self.mlp(self.mlp_norm(x, camera))


class TriplaneTransformer(nn.Module):
    """A stack of blocks over learnable triplane tokens, and a last layer norm.

    Args:
        tokens: Number L of triplane tokens.
        dim: Width D.
        depth: Number of blocks.
        heads: Attention heads a block.
        image_dim: Width M of the image features.
        camera_dim: Width E of the camera embedding.
    """

    def __init__(
        self, tokens: int, dim: int, depth: int, heads: int, image_dim: int, camera_dim: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, tokens, dim) / dim**0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, image_dim, camera_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise()

    def forward(self, image: Float[Tensor, "B N M"], camera: Float[Tensor, "B E"]) -> Float[Tensor, "B L D"]:
        """Turn image features and camera embeddings into triplane tokens."""
        x = self.tokens.expand(image.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, image, camera)
        return self.norm(x)

    def _initialise(self) -> None:
        residuals = 3 * len(self.blocks)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                if "modulation" in name:
                    nn.init.zeros_(parameter)  # every ModLN begins as a plain layer norm
                else:
                    # Variance 1 / inputs keeps the scale at any width; what adds to the residual stream is
                    # divided by the number of additions (GPT-2's rule), so that depth keeps it too.
                    scale = residuals**-0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                    nn.init.trunc_normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
