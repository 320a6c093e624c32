"""The LRM network, which maps an image and its camera to a triplane NeRF (arXiv 2311.04400, section 3 and figure 2).

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
    """Large Reconstruction Model.

    The default sizes are those in the paper.

    Args:
        encoder: Image encoder.
        decoder: NeRF MLP. The planes have ``decoder.channels`` channels.
        dim: Width D of the transformer.
        depth: Number of transformer blocks.
        heads: Number of attention heads per block.
        camera: Length of the camera vector, 20 (LRM) or 16 (OpenLRM). If None, the network is not conditioned on the
            camera (TripoSR).
        camera_dim: Width E of the camera embedding.
        plane_tokens: Number s of tokens along each side of a plane.
        upsample: Upsampling factor. The planes have S = ``upsample`` s texels per side.
        input_views: Number V of input views per object. If there are several views, the tokens of each view are
            modulated by the camera of the view (after Instant3D, section 3.2), and the first camera modulates the
            transformer.
        blocks: Design of the transformer blocks.
        qk_norm: Whether attention normalizes queries and keys (LVSM, section 4).
        plane_layout: Orientation of the planes.
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
                expected="1 input view, or several input views with camera conditioning",
                found=f"input_views={input_views} and camera={camera}",
                remedy="add --model.lrm.camera 20",
            )
        self.encoder = encoder
        embedding_dim = None if camera is None else camera_dim
        self.camera_embedder = None if camera is None else CameraEmbedder(camera_dim, camera)
        self.view_norm = ModLN(encoder.dim, embedding_dim) if input_views > 1 else None
        self.transformer = TriplaneTransformer(
            3 * plane_tokens**2, dim, depth, heads, encoder.dim, embedding_dim, blocks, qk_norm=qk_norm
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
        """Reconstruct objects from input views.

        Args:
            image: Input views in sRGB, with values in [0, 1].
            c2w: Poses of the input views in the canonical frame.
            fxfycxcy: Normalized intrinsics of the input views.
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
        """Combine triplanes and the decoder into radiance fields that can be rendered."""
        return self.decoder.field(triplane)
