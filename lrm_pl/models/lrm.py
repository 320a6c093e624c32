"""LRM: one image and its camera -> a triplane NeRF (arXiv 2311.04400, section 3 and figure 2). Read this first.

image (B, V, 3, H, W) --ImageEncoder--> tokens (B, V N, M) ----------.
c2w, fxfycxcy ----CameraEmbedder--> camera (B, E) --ModLN in each--.  | cross-attention
3 s s learnable tokens --TriplaneTransformer-----------------------+--+--> (B, 3 s s, D)
    --Upsampler--> planes (B, 3, F, S, S) --NeRFDecoder--> field: points -> density, color
"""

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.conventions import PlaneLayout
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import CameraNumbers
from lrm_pl.models.camera_embedder import CameraEmbedder
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.transformer import BlockDesign, ModLN, TriplaneTransformer
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
        camera: How many numbers the network is told of a camera: 20 (LRM), 16 (OpenLRM), or null for nothing, so
            that it guesses (TripoSR).
        camera_dim: Width E of the camera embedding.
        plane_tokens: Side s of a plane in tokens.
        upsample: Side S of a plane is ``upsample`` times s.
        input_views: How many views V of an object the network is given. With more than one, the tokens of each are
            modulated by its own camera before all are attended to (after Instant3D, section 3.2), and the camera of
            the first modulates the transformer.
        blocks: Design of the transformer: LRM's, or TripoSR's.
        qk_norm: Whether attention normalizes queries and keys (LVSM, section 4).
        plane_layout: How the planes lie in the world.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: NeRFDecoder,
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        camera: CameraNumbers | None = 20,
        camera_dim: int = 1024,
        plane_tokens: int = 32,
        upsample: int = 2,
        input_views: int = 1,
        blocks: BlockDesign = "lrm",
        *,
        qk_norm: bool = False,
        plane_layout: PlaneLayout = "lrm",
    ) -> None:
        super().__init__()
        if input_views < 1 or (input_views > 1 and camera is None):
            raise InputError(
                expected="input_views of 1, or of more with a camera that tells them apart",
                found=f"{input_views} and camera {camera}",
                remedy="give --model.lrm.camera 20",
            )
        self.encoder = encoder
        told = None if camera is None else camera_dim
        self.camera_embedder = None if camera is None else CameraEmbedder(camera_dim, camera)
        self.view_norm = ModLN(encoder.dim, told) if input_views > 1 else None
        self.transformer = TriplaneTransformer(
            3 * plane_tokens**2, dim, depth, heads, encoder.dim, told, blocks, qk_norm=qk_norm
        )
        self.upsampler = Upsampler(dim, decoder.channels, upsample)
        self.decoder = decoder
        self.input_views, self.plane_layout = input_views, plane_layout

    def forward(
        self,
        image: Float[Tensor, "B V 3 H W"],
        c2w: Float[Tensor, "B V 4 4"],
        fxfycxcy: Float[Tensor, "B V 4"],
    ) -> Triplane:
        """Reconstruct objects from their canonical input views.

        Args:
            image: Input views, sRGB in [0, 1].
            c2w: Their canonical poses.
            fxfycxcy: Their normalized intrinsics.
        """
        views = image.shape[1]
        assert views == self.input_views, (views, self.input_views)
        tokens = self.encoder(image.flatten(0, 1))  # (B V, N, M)
        camera = None
        if self.camera_embedder is not None:
            cameras = self.camera_embedder(c2w, fxfycxcy)  # (B, V, E)
            camera = cameras[:, 0]
            if self.view_norm is not None:
                tokens = self.view_norm(tokens, cameras.flatten(0, 1))
        tokens = self.transformer(tokens.unflatten(0, (-1, views)).flatten(1, 2), camera)  # (B, 3 s s, D)
        return Triplane(self.upsampler(tokens), self.plane_layout)  # (B, 3, F, S, S)

    def field(self, triplane: Triplane) -> TriplaneField:
        """Turn triplanes into fields that can be rendered."""
        return self.decoder.field(triplane)
