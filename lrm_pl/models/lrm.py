"""LRM: one image and its camera -> a triplane NeRF (arXiv 2311.04400, section 3 and figure 2). Read this first.

image (B, 3, H, W) --ImageEncoder--> tokens (B, N, M) ---------------.
c2w, fxfycxcy ----CameraEmbedder--> camera (B, E) --ModLN in each--.  | cross-attention
3 s s learnable tokens --TriplaneTransformer-----------------------+--+--> (B, 3 s s, D)
    --Upsampler--> planes (B, 3, F, S, S) --NeRFDecoder--> field: points -> density, colour
"""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.models.camera_embedder import CameraEmbedder
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.transformer import TriplaneTransformer
from lrm_pl.models.triplane import Triplane, TriplaneField
from lrm_pl.models.upsampler import Upsampler


@final
class LRM(nn.Module):
    """The network. The defaults are the paper's size.

    Args:
        encoder: Image encoder.
        decoder: NeRF MLP; its ``channels`` are those of the planes.
        dim: Width D of the transformer.
        depth: Number of blocks.
        heads: Attention heads a block.
        camera_dim: Width E of the camera embedding.
        plane_tokens: Side s of a plane in tokens.
        upsample: Side S of a plane is ``upsample`` times s.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: NeRFDecoder,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        camera_dim: int = 1024,
        plane_tokens: int = 32,
        upsample: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.camera_embedder = CameraEmbedder(camera_dim)
        self.transformer = TriplaneTransformer(
            3 * plane_tokens**2, dim, depth, heads, encoder.dim, camera_dim
        )
        self.upsampler = Upsampler(dim, decoder.channels, upsample)
        self.decoder = decoder

    def forward(
        self, image: Float[Tensor, "B 3 H W"], c2w: Float[Tensor, "B 4 4"], fxfycxcy: Float[Tensor, "B 4"]
    ) -> Triplane:
        """Reconstruct objects from one canonical view each.

        Args:
            image: Input views, sRGB in [0, 1].
            c2w: Their canonical poses.
            fxfycxcy: Their normalised intrinsics.
        """
        tokens = self.encoder(image)  # (B, N, M)
        camera = self.camera_embedder(c2w, fxfycxcy)  # (B, E)
        tokens = self.transformer(tokens, camera)  # (B, 3 s s, D)
        return Triplane(self.upsampler(tokens))  # (B, 3, F, S, S)

    def field(self, triplane: Triplane) -> TriplaneField:
        """Turn triplanes into fields that can be rendered."""
        return self.decoder.field(triplane)
