"""Branches for accelerators that training and inference do not take."""

import pytest
import torch

from lrm_pl.kernels.attention import attention_in_blocks, attention_plain
from lrm_pl.planning.gpus import peak_flops


def test_attention_in_blocks_requires_a_cpu(device):
    q, k, v = torch.randn(3, 1, 2, 8, 4, device=device.name)
    with pytest.raises(ValueError, match="on the CPU, but found"):
        attention_in_blocks(q, k, v)
    device.to_cpu()
    assert torch.allclose(
        attention_in_blocks(q.cpu(), k.cpu(), v.cpu()), attention_plain(q, k, v).cpu(), atol=1e-5
    )


def test_the_peak_rate_is_measured_only_on_a_cpu(device):
    where = torch.device(device.name)
    assert device.is_gpu or peak_flops(where) is None
    device.to_cpu()
    assert peak_flops(torch.device("cpu")) > 1e9
