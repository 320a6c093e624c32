"""Fused linear layer and activation, compared with the reference implementation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrm_pl.kernels.linear import linear_activated, linear_plain


def layer(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((500, 64), (48, 64), (48,)))
    return x.to(dtype), weight / 8, bias


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_fused_layer_is_as_accurate_as_the_reference(act):
    x, weight, bias = layer()
    with torch.no_grad():
        exact = linear_plain(x.float(), weight, bias, act)
        plain = linear_plain(x, weight.bfloat16(), bias.bfloat16(), act)
        body = linear_activated(x, weight, bias, act)
    assert body.dtype == torch.bfloat16
    assert not torch.equal(body, plain) or act == "relu"  # SiLU is rounded once less: the body was used
    error, twins = (body - exact).abs().max(), (plain - exact).abs().max()
    assert error < 0.03
    assert error <= 1.05 * twins


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_reference_is_used_with_gradients_and_in_float32(act):
    x, weight, bias = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_activated(x, weight, bias, act), linear_plain(x, weight, bias, act))
    x, weight, bias = layer(torch.float32)
    with torch.no_grad():
        assert torch.equal(linear_activated(x, weight, bias, act), linear_plain(x, weight, bias, act))


def test_flops_of_the_fused_layer_are_counted():
    x, weight, bias = layer()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_activated(x, weight, bias, "silu")
    assert counter.get_total_flops() == 2 * 500 * 64 * 48
