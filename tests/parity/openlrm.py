"""Reference implementation of OpenLRM 1.1 with the key names of the published weights.

From the published description of the network and the names in its weights; checked against answers of the original
code, where they are at hand (``test_goldens.py``).
"""

import torch
from torch import nn
from torch.nn import functional as F


class _Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim))


class _Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class _Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class _EncoderBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), _Attention(dim, heads), _Scale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), _Mlp(dim), _Scale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _DinoV2(nn.Module):
    """DINOv2 with registers. The position embeddings of ``stored`` x ``stored`` patches are resized to the image."""

    def __init__(self, dim, depth, heads, stored):
        super().__init__()
        self.stored = stored
        self.cls_token, self.register_tokens = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, 4, dim)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + stored**2, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 14, 14)
        self.blocks = nn.ModuleList(_EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image):
        patches = self.patch_embed.proj(image)
        side = patches.shape[-1]
        grid = self.pos_embed[:, 1:].view(1, self.stored, self.stored, -1).permute(0, 3, 1, 2)
        if side != self.stored:
            grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        places = torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        batch = len(image)
        x = (
            torch.cat([self.cls_token.expand(batch, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
            + places
        )
        x = torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 5:]], dim=1)


class _ModLN(nn.Module):
    def __init__(self, dim, camera_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(camera_dim, 2 * dim))

    def forward(self, x, camera):
        shift, scale = self.mlp(camera).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class _Layer(nn.Module):
    def __init__(self, dim, heads, image_dim, camera_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (_ModLN(dim, camera_dim) for _ in range(3))
        options = {"bias": False, "batch_first": True}
        self.cross_attn = nn.MultiheadAttention(dim, heads, kdim=image_dim, vdim=image_dim, **options)
        self.self_attn = nn.MultiheadAttention(dim, heads, **options)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim), nn.Identity()
        )

    def forward(self, x, image, camera):
        x = x + self.cross_attn(self.norm1(x, camera), image, image, need_weights=False)[0]
        y = self.norm2(x, camera)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm3(x, camera))


class OpenLRM(nn.Module):
    """Network of OpenLRM."""

    def __init__(
        self, encoder_dim=48, encoder_depth=2, encoder_heads=3, stored=7, camera_dim=32, dim=64, depth=2, heads=4,
        side=8, channels=8,
    ):  # fmt: skip
        super().__init__()
        self.side = side
        self.encoder = nn.Module()
        self.encoder.model = _DinoV2(encoder_dim, encoder_depth, encoder_heads, stored)
        self.camera_embedder = nn.Module()
        self.camera_embedder.mlp = nn.Sequential(
            nn.Linear(16, camera_dim), nn.SiLU(), nn.Linear(camera_dim, camera_dim)
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 3 * side**2, dim))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            _Layer(dim, heads, encoder_dim, camera_dim) for _ in range(depth)
        )
        self.transformer.norm = nn.LayerNorm(dim, eps=1e-6)
        self.upsampler = nn.ConvTranspose2d(dim, channels, 2, 2)
        self.synthesizer = nn.Module()
        self.synthesizer.decoder = nn.Module()
        layers = [
            nn.Linear(3 * channels, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
        ]
        self.synthesizer.decoder.net = nn.Sequential(*layers, nn.Linear(64, 4))

    def planes(self, image, camera):
        """Map images (B, 3, H, W) in [0, 1] and cameras (B, 16) with OpenGL poses to planes (B, 3, F, S, S)."""
        tokens, camera = self.encoder.model(image), self.camera_embedder.mlp(camera)
        x = self.pos_embed.expand(len(image), -1, -1)
        for layer in self.transformer.layers:
            x = layer(x, tokens, camera)
        x = self.transformer.norm(x).view(len(image), 3, self.side, self.side, -1)
        return torch.stack([self.upsampler(x[:, p].permute(0, 3, 1, 2)) for p in range(3)], dim=1)

    def query(self, planes, points):
        """Return the raw densities (B, Q) and colors (B, Q, 3) of planes (B, 3, F, S, S) at points (B, Q, 3)."""
        features = []
        for p, pair in enumerate(((0, 1), (0, 2), (2, 1))):
            grid = points[:, None, :, list(pair)]
            features.append(F.grid_sample(planes[:, p], grid, align_corners=False)[:, :, 0].transpose(1, 2))
        out = self.synthesizer.decoder.net(torch.cat(features, dim=-1))
        return out[..., 0], torch.sigmoid(out[..., 1:]) * 1.002 - 0.001

    def render(self, planes, origins, directions, coarse, fine, background):
        """Return the colors (B, R, 3) and opacities (B, R) of rays (B, R, 3), with evenly spaced samples.

        Rays are clipped to the box [-1, 1]^3; samples outside are empty.
        """
        low, high = (-1 - origins) / directions, (1 - origins) / directions
        near, far = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
        hit = far > near
        near, far = torch.where(hit, near, near[hit].min()), torch.where(hit, far, far[hit].max())
        t = near[..., None] + (far - near)[..., None] * (torch.arange(coarse) + 0.5) / (coarse - 1)
        first = self._at(planes, origins, directions, t)
        weights = _march(*first, t)[2]
        larger = F.max_pool1d(weights.flatten(0, 1)[:, None], 2, 1, padding=1)
        weights = F.avg_pool1d(larger, 2, 1)[:, 0].view_as(weights) + 0.01
        more = _inverse_transform((t[..., 1:] + t[..., :-1]) / 2, weights[..., 1:-1], fine)
        both, order = torch.cat([t, more], dim=-1).sort(dim=-1)
        second = self._at(planes, origins, directions, more)
        raw = torch.cat([first[0], second[0]], dim=-1).gather(-1, order)
        rgb = torch.cat([first[1], second[1]], dim=-2).gather(-2, order[..., None].expand(*order.shape, 3))
        color, opacity, _ = _march(raw, rgb, both)
        return color + (1 - opacity)[..., None] * background, opacity

    def _at(self, planes, origins, directions, t):
        points = origins[..., None, :] + t[..., None] * directions[..., None, :]
        raw, rgb = self.query(planes, points.flatten(1, 2))
        raw, rgb = raw.view(t.shape), rgb.view(*t.shape, 3)
        outside = (points.abs() > 1).any(dim=-1)
        return raw.masked_fill(outside, torch.finfo(raw.dtype).min / 8), rgb.masked_fill(
            outside[..., None], 0
        )


def _march(raw, rgb, t):
    delta = t[..., 1:] - t[..., :-1]
    sigma = F.softplus((raw[..., 1:] + raw[..., :-1]) / 2 - 1)
    alpha = 1 - torch.exp(-sigma * delta)
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10], dim=-1), dim=-1)[
        ..., :-1
    ]
    weights = alpha * through
    return (weights[..., None] * (rgb[..., 1:, :] + rgb[..., :-1, :]) / 2).sum(-2), weights.sum(-1), weights


def _inverse_transform(edges, weights, count):
    """For each u, return the bin whose cumulative weight contains it, with a loop over bins."""
    share = (weights + 1e-5) / (weights + 1e-5).sum(-1, keepdim=True)
    cumulative = F.pad(share.cumsum(-1), (1, 0))
    u = torch.linspace(0, 1, count)
    result = edges[..., weights.shape[-1], None].expand(*edges.shape[:-1], count).clone()
    for k in range(weights.shape[-1]):
        low, high = cumulative[..., k, None], cumulative[..., k + 1, None]
        inside = (u >= low) & (u < high)
        place = (u - low) / torch.where(high - low < 1e-5, 1.0, high - low)
        result = torch.where(
            inside, edges[..., k, None] + place * (edges[..., k + 1] - edges[..., k])[..., None], result
        )
    return result
