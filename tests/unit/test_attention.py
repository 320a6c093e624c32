"""Tests of attention in blocks, compared with the reference implementation."""

import pytest
import torch

from lrm_pl.kernels import attention as kernel
from lrm_pl.kernels.attention import attention_in_blocks, attention_plain
from lrm_pl.models import attention as chooser
from lrm_pl.models.attention import Attention


def qkv(batch=2, heads=3, queries=70, keys=50, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width))
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def outcome(body, tensors):
    out = body(*tensors)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


@pytest.mark.parametrize("scores", [1, 500, 10**9])  # a row at a time, ten rows, all at once
def test_blocks_match_the_reference_in_values_and_gradients(monkeypatch, scores):
    monkeypatch.setattr(kernel, "_SCORES", scores)
    tensors = qkv()
    for ours, theirs in zip(
        outcome(attention_in_blocks, tensors), outcome(attention_plain, tensors), strict=True
    ):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_blocks_in_bf16_are_as_accurate_as_the_reference():
    exact = outcome(attention_plain, qkv(queries=300, keys=200))
    rounded = qkv(queries=300, keys=200, dtype=torch.bfloat16)
    ours, theirs = outcome(attention_in_blocks, rounded), outcome(attention_plain, rounded)
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - truth).norm() < 1.2 * (other - truth).norm()


def test_results_with_one_and_three_threads_are_bitwise_equal():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(outcome(attention_in_blocks, qkv()))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the checks' own copies
def test_the_operator_passes_opcheck():
    torch.library.opcheck(
        torch.ops.lrm_pl.attention_in_blocks,
        tuple(x.detach().contiguous().requires_grad_() for x in qkv(1, 2, 9, 7, 4)),
    )


def test_only_large_scores_are_computed_in_blocks(monkeypatch):
    ran = []
    for name in ("attention_in_blocks", "attention_plain"):
        body = getattr(chooser, name)
        monkeypatch.setattr(chooser, name, lambda *a, name=name, body=body: ran.append(name) or body(*a))
    layer = Attention(8, heads=2)
    layer(torch.randn(1, 100, 8))
    layer(torch.randn(1, 513, 8))
    assert ran == ["attention_plain", "attention_in_blocks"]


def test_no_scores_are_saved_for_backward():
    saved = []
    q, k, v = qkv(1, 1, 400, 400)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = attention_in_blocks(q, k, v)
    out.sum().backward()
    assert max(saved) == 400 * 8


def test_different_dtypes_are_an_error():
    q, k, v = qkv()
    with pytest.raises(
        ValueError, match=r"of the same dtype on the CPU, but found torch\.float32 on cpu, torch\.bfloat16"
    ):
        attention_in_blocks(q, k.bfloat16(), v)


def test_attention_runs_in_inference_mode_on_several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            assert Attention(8, heads=2)(torch.randn(1, 513, 8)).shape == (1, 513, 8)
    finally:
        torch.set_num_threads(before)
