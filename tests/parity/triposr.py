"""Reference implementation of TripoSR with the key names of the published weights.

From the published description of the network and the names in its weights; checked against answers of the original
code, where they are at hand (``test_goldens.py``).
"""

import torch
from torch import nn
from torch.nn import functional as F

RADIUS = 0.87


def _attention(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _module(**parts):
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class _EncoderLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        linear = {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
        self.attention = _module(attention=_module(**linear), output=_module(dense=nn.Linear(dim, dim)))
        self.intermediate = _module(dense=nn.Linear(dim, 4 * dim))
        self.output = _module(dense=nn.Linear(4 * dim, dim))
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(dim, eps=1e-12) for _ in range(2))

    def forward(self, x):
        y, parts = self.layernorm_before(x), self.attention.attention
        y = _attention(parts.query(y), parts.key(y), parts.value(y), self.heads)
        x = x + self.attention.output.dense(y)
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class _Vit(nn.Module):
    """Vision transformer of transformers 4.35 with position embeddings for ``stored`` x ``stored`` patches."""

    def __init__(self, dim, depth, heads, stored):
        super().__init__()
        self.stored = stored
        self.embeddings = _module(
            cls_token=nn.Parameter(torch.zeros(1, 1, dim)),
            position_embeddings=nn.Parameter(torch.zeros(1, 1 + stored**2, dim)),
            patch_embeddings=_module(projection=nn.Conv2d(3, dim, 16, 16)),
        )
        self.encoder = _module(layer=nn.ModuleList(_EncoderLayer(dim, heads) for _ in range(depth)))
        self.layernorm = nn.LayerNorm(dim, eps=1e-12)
        self.pooler = _module(dense=nn.Linear(dim, dim))

    def forward(self, image):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        patches = self.embeddings.patch_embeddings.projection(
            (image - mean[:, None, None]) / std[:, None, None]
        )
        places, factor = self.embeddings.position_embeddings, (patches.shape[-1] + 0.1) / self.stored
        grid = places[:, 1:].transpose(1, 2).unflatten(2, (self.stored, self.stored))
        if patches.shape[-1] != self.stored:
            grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        token = self.embeddings.cls_token.expand(len(image), -1, -1)
        x = torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1)
        x = x + torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)


class _Attention(nn.Module):
    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.heads, self.to_q = heads, nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context):
        return self.to_out[0](_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class _Block(nn.Module):
    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = _Attention(dim, heads, dim), _Attention(dim, heads, context_dim)
        self.ff = _module(
            net=nn.ModuleList([_module(proj=nn.Linear(dim, 8 * dim)), nn.Identity(), nn.Linear(4 * dim, dim)])
        )

    def forward(self, x, image):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), image)
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff.net[2](value * F.gelu(gate))


class TripoSR(nn.Module):
    """Network of TripoSR."""

    def __init__(
        self, encoder_dim=48, encoder_depth=2, encoder_heads=3, stored=4, dim=64, depth=2, heads=4, side=8,
        channels=8, width=64,
    ):  # fmt: skip
        super().__init__()
        self.image_tokenizer = _module(model=_Vit(encoder_dim, encoder_depth, encoder_heads, stored))
        self.tokenizer = _module(embeddings=nn.Parameter(torch.zeros(3, dim, side, side)))
        self.backbone = _module(
            norm=nn.GroupNorm(32, dim, eps=1e-6), proj_in=nn.Linear(dim, dim), proj_out=nn.Linear(dim, dim),
            transformer_blocks=nn.ModuleList(_Block(dim, heads, encoder_dim) for _ in range(depth)),
        )  # fmt: skip
        self.post_processor = _module(upsample=nn.ConvTranspose2d(dim, channels, 2, 2))
        layers = [nn.Linear(3 * channels, width), nn.SiLU()]
        for _ in range(8):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.decoder = _module(layers=nn.Sequential(*layers, nn.Linear(width, 4)))

    def planes(self, image):
        """Map images (B, 3, H, W) in [0, 1] to planes (B, 3, F, S, S)."""
        tokens, back = self.image_tokenizer.model(image), self.backbone
        embeddings = self.tokenizer.embeddings
        start = embeddings.transpose(0, 1).flatten(1).expand(len(image), -1, -1)  # (B, D, 3 s s)
        x = back.proj_in(back.norm(start).transpose(1, 2))
        for block in back.transformer_blocks:
            x = block(x, tokens)
        x = (back.proj_out(x).transpose(1, 2) + start).unflatten(2, (3, *embeddings.shape[-2:]))
        return torch.stack([self.post_processor.upsample(x[:, :, p]) for p in range(3)], dim=1)

    def query(self, planes, points):
        """Return the densities (B, Q) and colors (B, Q, 3) of planes (B, 3, F, S, S) at points (B, Q, 3) of TripoSR."""
        features = []
        for p, pair in enumerate(((0, 1), (0, 2), (1, 2))):
            grid = (points / RADIUS)[:, None, :, list(pair)]
            features.append(F.grid_sample(planes[:, p], grid, align_corners=False)[:, :, 0].transpose(1, 2))
        out = self.decoder.layers(torch.cat(features, dim=-1))
        return torch.exp(out[..., 0] - 1), torch.sigmoid(out[..., 1:])

    def render(self, planes, origins, directions, samples):
        """Return the colors (B, R, 3) of rays (B, R, 3) in the coordinates of TripoSR over white."""
        low, high = (-RADIUS - origins) / directions, (RADIUS - origins) / directions
        near, far = torch.minimum(low, high).amax(-1).clamp_min(0), torch.maximum(low, high).amin(-1)
        share = (torch.arange(samples) + 0.5) / samples
        t = near[..., None] * (1 - share) + far[..., None] * share
        points = origins[..., None, :] + t[..., None] * directions[..., None, :]
        sigma, rgb = self.query(planes, points.flatten(1, 2))
        alpha = 1 - torch.exp(-sigma.view(t.shape) / samples)  # the length of a chord is 1
        alpha = torch.where((far > near)[..., None], alpha, 0)
        through = torch.cumprod(F.pad(1 - alpha + 1e-10, (1, 0), value=1.0), dim=-1)[..., :-1]
        weights = alpha * through
        color = (weights[..., None] * rgb.view(*t.shape, 3)).sum(-2)
        return color + 1 - weights.sum(-1, keepdim=True)
