"""The account of a program on fake tensors: each figure is worked out by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard

from lrm_pl.kernels.attention import attention_in_blocks
from lrm_pl.training.costs.fake_group import as_rank
from lrm_pl.training.costs.ledger import Ledger, Message


def test_the_peak_is_what_lived_at_once():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        a = torch.empty(1000)
        b = a + 1  # 8000 bytes live
        del a
        c = b * 2  # again 8000
        del b, c
    assert ledger.peak == 8000
    assert ledger.held == 0


def test_views_hold_nothing_of_their_own():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        a = torch.empty(10, 100)
        views = [a.T, a[3:], a.view(-1), a.detach()]
        assert ledger.held == 4000
        del a
        assert ledger.held == 4000  # a view keeps it
        del views
    assert ledger.held == 0


def test_products_are_counted_and_other_operations_have_bytes_only():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        x, w = torch.empty(5, 7), torch.empty(7, 11)
        product = x @ w
        product.relu()
    assert ledger.flops() == 2 * 5 * 7 * 11
    assert [(x.name, x.moved) for x in ledger.operations] == [
        ("empty", 0.0), ("empty", 0.0), ("mm", 4.0 * (35 + 77 + 55)), ("relu", 4.0 * (55 + 55)),
    ]  # fmt: skip


def test_a_softmax_with_its_gradient_is_as_many_operations_as_kernels_are_started():
    ledger = Ledger()
    x = torch.empty(3, 5, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        torch.softmax(x, -1).sum().backward()
    names = [x.name for x in ledger.operations]
    assert names == ["_softmax", "sum", "ones_like", "_softmax_backward_data"]
    assert ledger.operations[2].moved == 4.0  # what is made after a pattern does not read it


def test_blockwise_attention_counts_two_products_forward_and_five_backward():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        q, k, v = (torch.empty(2, 3, length, 8, requires_grad=True) for length in (40, 50, 50))
        out = attention_in_blocks(q, k, v)
        forward = ledger.flops()
        out.sum().backward()
    product = 2 * (2 * 3) * 40 * 50 * 8
    assert forward == 2 * product
    assert ledger.flops() - forward == 5 * product


def test_what_is_repeated_by_several_threads_counts_as_often_and_is_held_as_often():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        x, w = torch.empty(10, 10), torch.empty(10, 10)
        with ledger.repeated(6.0, threads=3):
            y = x @ w
            del y
    assert ledger.flops() == 6 * 2000
    assert ledger.operations[-1].count == 6
    assert ledger.peak == 2 * 400 + 3 * 400


def test_what_is_set_aside_is_out_of_the_peak_but_in_the_sum():
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        gradient = torch.empty(100)
        ledger.set_aside(gradient)
        other = torch.empty(50)
        del other
    assert ledger.peak == 400  # the gradient before it was set aside
    assert ledger.aside == 400
    assert ledger.peak_with_aside == 600


@pytest.mark.parametrize(
    ("kind", "expected"), [("gather", 1000 * 3 / 4), ("scatter", 1000 * 3 / 4), ("reduce", 2 * 1000 * 3 / 4)]
)
def test_a_ring_of_four_sends_three_quarters_and_twice_for_a_sum_that_all_get(kind, expected):
    assert Message(kind, 1000.0, 4).sent == expected


@pytest.mark.parametrize("copies", [1, 2])
def test_messages_and_memory_of_a_sharded_layer_are_those_of_its_parts(copies):
    """A layer of 8 x 16 weights without bias: gathered twice, its gradient summed once."""
    ledger, processes = Ledger(), 4
    with as_rank(1, processes, copies) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        layer = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU())
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        with ledger, ledger.seeing_resizes():
            layer(torch.empty(2, 16)).sum().backward()
    sizes = {(message.kind, message.size, message.processes) for message in ledger.messages}
    parts = processes // copies
    expected = {("gather", 512.0, parts), ("scatter", 512.0, parts)}
    if copies > 1:
        expected.add(("reduce", 512.0 / parts, copies))
    assert sizes == expected
