"""Self- and cross-attention on PyTorch's scaled dot product; the backend is chosen in one function."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.attention import attention_in_blocks, attention_plain
from lrm_pl.kernels.device import on_cpu


class Attention(nn.Module):
    """Multi-head attention without biases (LRM, section 3.2; OpenLRM does the same).

    Args:
        dim: Width D of the queries and of the output.
        heads: Number of heads; divides D.
        context_dim: Width of the tokens attended to; None for self-attention, with one fused QKV product.
        out_bias: Whether the output projection has a bias (TripoSR's has).
        qk_norm: Whether queries and keys are normalized head by head before their product, by their root mean
            square with a learned scale: logits then stay bounded (LVSM, section 4; Dehghani et al. 2023, 2.1).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        *,
        out_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(expected=f"a width that {heads} heads divide", found=dim)
        self.heads = heads
        self.is_self = context_dim is None
        if context_dim is None:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        else:
            self.q = nn.Linear(dim, dim, bias=False)
            self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=out_bias)
        self.q_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B L D"], context: Float[Tensor, "B N M"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Attend from ``x`` to itself, or to ``context``."""
        if self.is_self:
            q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q, (k, v) = (
                self._split(self.q(x)),
                (self._split(part) for part in self.kv(context).chunk(2, dim=-1)),
            )
        # The norms' float32 scale would raise q and k above v's precision under autocast.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))

    def _split(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B h L d"]:
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, -1).transpose(1, 2)


#: From so many scores a head on, a CPU computes attention block by block.
_MANY_SCORES = 256 * 1024


def attend(
    q: Float[Tensor, "B h L d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
) -> Float[Tensor, "B h L d"]:
    """Compute softmax(q k^T / sqrt d) v; the one place where the backend is chosen.

    On a CPU: as written where the scores fit the cache, else block by block of queries. Elsewhere PyTorch chooses; and
    in float32 without gradients, where published weights are compared with their own code: their scores may be so large
    that another order of sums shows.
    """
    if not on_cpu(q) or (q.dtype == torch.float32 and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v)
    body = attention_in_blocks if q.shape[2] * k.shape[2] >= _MANY_SCORES else attention_plain
    return body(q, k, v)
