"""Multi-head self-attention and cross-attention."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.attention import attention_in_blocks, attention_plain
from lrm_pl.kernels.device import on_cpu


class Attention(nn.Module):
    """Multi-head attention without biases in the input projections (LRM, section 3.2).

    Args:
        dim: Width D of the queries and of the output.
        heads: Number of heads, which must divide D.
        context_dim: Width M of the context tokens. If None, the layer computes self-attention with a fused QKV
            projection.
        out_bias: Whether the output projection has a bias (TripoSR).
        qk_norm: Whether to apply RMSNorm to queries and keys per head, which bounds the logits (LVSM, section 4;
            Dehghani et al. 2023, section 2.1).
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
            raise InputError(expected=f"a width divisible by the number of heads, {heads}", found=dim)
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
        """Compute self-attention of ``x``, or cross-attention from ``x`` to ``context``."""
        if self.is_self:
            q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q = self._split(self.q(x))
            k, v = (self._split(part) for part in self.kv(context).chunk(2, dim=-1))
        # The norms return float32 under autocast.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))

    def _split(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B h L d"]:
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, -1).transpose(1, 2)


#: Minimum number of scores per head for which a CPU computes attention in blocks of queries.
_MIN_BLOCKED_SCORES = 256 * 1024


def attend(
    q: Float[Tensor, "B h L d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
) -> Float[Tensor, "B h L d"]:
    """Compute softmax(q k^T / sqrt d) v.

    PyTorch's ``scaled_dot_product_attention`` is used on accelerators. On a CPU, it is used only for float32 inputs
    without gradients, so that the outputs of published weights can be compared with those of the original code. With
    large logits, a different order of summation would change the outputs noticeably. In all other cases, attention is
    computed by ``attention_plain`` if the scores fit in the cache, and in blocks of queries otherwise.
    """
    if not on_cpu(q) or (q.dtype == torch.float32 and not torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v)
    attention = attention_in_blocks if q.shape[2] * k.shape[2] >= _MIN_BLOCKED_SCORES else attention_plain
    return attention(q, k, v)
