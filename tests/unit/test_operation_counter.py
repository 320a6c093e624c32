"""Tests of operation counts on fake tensors, compared with values computed by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lrm_pl.kernels.attention import attention_in_blocks
from lrm_pl.planning.kernel_bytes import BYTES_FORMULAS
from lrm_pl.planning.operation_counter import Collective, OperationCounter
from lrm_pl.planning.sharding import fake_process_group


def test_the_peak_is_the_maximum_size_of_live_tensors():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        a = torch.empty(1000)
        b = a + 1  # 8000 bytes live
        del a
        c = b * 2  # again 8000
        del b, c
    assert counter.peak == 8000
    assert counter.allocated == 0


def test_views_do_not_allocate_memory():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        a = torch.empty(10, 100)
        views = [a.T, a[3:], a.view(-1), a.detach()]
        assert counter.allocated == 4000
        del a
        assert counter.allocated == 4000  # a view keeps the storage
        del views
    assert counter.allocated == 0


def test_flops_of_matrix_products_and_bytes_of_all_operations_are_counted():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        x, w = torch.empty(5, 7), torch.empty(7, 11)
        product = x @ w
        product.relu()
    assert counter.flops() == 2 * 5 * 7 * 11
    assert [(x.name, x.accessed) for x in counter.operations] == [
        ("empty", 0.0), ("empty", 0.0), ("mm", 4.0 * (35 + 77 + 55)), ("relu", 4.0 * (55 + 55)),
    ]  # fmt: skip


def test_a_softmax_with_its_gradient_counts_one_operation_per_kernel():
    counter = OperationCounter()
    x = torch.empty(3, 5, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        torch.softmax(x, -1).sum().backward()
    names = [x.name for x in counter.operations]
    assert names == ["_softmax", "sum", "ones_like", "_softmax_backward_data"]
    assert counter.operations[2].accessed == 4.0  # only the shape of the other tensor is read


def test_blockwise_attention_counts_two_products_forward_and_five_backward():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        q, k, v = (torch.empty(2, 3, length, 8, requires_grad=True) for length in (40, 50, 50))
        out = attention_in_blocks(q, k, v)
        forward = counter.flops()
        out.sum().backward()
    product = 2 * (2 * 3) * 40 * 50 * 8
    assert forward == 2 * product
    assert counter.flops() - forward == 5 * product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_dot_product_attention_counts_two_products_forward_and_five_backward(dtype):
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        q, k, v = (torch.empty(2, 3, length, 8, dtype=dtype, requires_grad=True) for length in (40, 50, 50))
        out = F.scaled_dot_product_attention(q, k, v)
        forward, moved = counter.flops(), sum(x.accessed for x in counter.operations)
        out.sum().backward()
    product = 2 * (2 * 3) * 40 * 50 * 8
    assert forward == 2 * product
    assert counter.flops() - forward == 5 * product
    # Queries and the output, keys and values, and a float32 per query for backward: no scores.
    assert moved == dtype.itemsize * 6 * 8 * (2 * 40 + 2 * 50) + 4 * 6 * 40


def test_accessed_bytes_by_operator():
    """float32 has 4 bytes, int64 has 8 bytes."""
    cases = {
        "copy_": (lambda x, i: x.copy_(torch.empty(10, 6)), 4 * 60 * 2),
        "zero_": (lambda x, i: x.zero_(), 4 * 60),
        "add_": (lambda x, i: x.add_(1), 4 * 60 * 2),
        "index": (lambda x, i: x[i], 8 * 3 + 2 * 4 * 18),
        "index_put_": (lambda x, i: x.index_put_((i,), torch.empty(3, 6)), 8 * 3 + 2 * 4 * 18),
        "add": (lambda x, i: x + torch.empty(1, 6).expand(10, 6), 4 * (60 + 6 + 60)),
    }  # fmt: skip
    for name, (run, moved) in cases.items():
        counter = OperationCounter()
        with FakeTensorMode():
            x, index = torch.empty(10, 6), torch.empty(3, dtype=torch.int64)
            with counter:
                run(x, index)
        assert [(o.name, o.accessed) for o in counter.operations if o.accessed] == [(name, moved)]


@torch.library.custom_op("lrm_pl::doubling_of_a_test", mutates_args=())
def _double_twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * (2 * x)


@_double_twice.register_fake
def _(x):
    return torch.empty_like(x)


DOUBLING = torch.ops.lrm_pl.doubling_of_a_test


def counted(op, **options):
    counter = OperationCounter(**options)
    with FakeTensorMode():
        x = torch.empty(100)
        with counter:
            op(x)
    return counter


def test_a_custom_operator_accesses_its_inputs_and_outputs_or_is_decomposed():
    assert sum(x.accessed for x in counted(DOUBLING).operations) == 2 * 400
    opened = counted(DOUBLING, decomposed={"doubling_of_a_test"})
    assert [x.name for x in opened.operations] == ["mul", "mul"]
    assert sum(x.accessed for x in opened.operations) == 4 * 400
    assert opened.peak == 2 * 400


def test_a_formula_determines_the_accessed_bytes_and_the_scratch_of_an_operator(monkeypatch):
    monkeypatch.setitem(
        BYTES_FORMULAS, DOUBLING, lambda x, *, out_val: (x.nbytes + out_val.nbytes / 2, 1000.0)
    )
    counter = counted(DOUBLING)
    (operation,) = counter.operations
    assert (operation.accessed, operation.scratch) == (600.0, 1000.0)
    assert counter.peak == 400 + 1000
    assert counter.allocated == 0


def test_scratch_is_not_multiplied_by_repetitions(monkeypatch):
    monkeypatch.setitem(BYTES_FORMULAS, DOUBLING, lambda x, *, out_val: (8.0, 16.0))
    counter = OperationCounter()
    with FakeTensorMode(), counter, counter.repeated(5.0):
        DOUBLING(torch.empty(1))
    assert (counter.operations[-1].accessed, counter.operations[-1].scratch) == (40.0, 16.0)


def test_operations_are_multiplied_by_repetitions_and_memory_by_threads():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        x, w = torch.empty(10, 10), torch.empty(10, 10)
        with counter.repeated(6.0, threads=3):
            y = x @ w
            del y
    assert counter.flops() == 6 * 2000
    assert counter.operations[-1].count == 6
    assert counter.peak == 2 * 400 + 3 * 400


def test_gradients_are_excluded_from_the_peak_and_included_in_the_sum():
    counter = OperationCounter()
    with FakeTensorMode(), counter:
        gradient = torch.empty(100)
        counter.track_gradient(gradient)
        other = torch.empty(50)
        del other
    assert counter.peak == 400  # the gradient, before it is tracked as such
    assert counter.gradients == 400
    assert counter.peak_with_gradients == 600


@pytest.mark.parametrize(
    ("op", "expected"),
    [("all_gather", 1000 * 3 / 4), ("reduce_scatter", 1000 * 3 / 4), ("all_reduce", 2 * 1000 * 3 / 4)],
)
def test_bytes_sent_in_a_ring_of_four_processes(op, expected):
    assert Collective(op, 1000.0, 4).sent == expected


@pytest.mark.parametrize("replicas", [1, 2])
def test_collectives_of_a_sharded_layer(replicas):
    """The 8 x 16 weights are gathered twice, and their gradient is reduced once."""
    counter, processes = OperationCounter(), 4
    with fake_process_group(1, processes, replicas) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        layer = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU())
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        with counter, counter.track_resizes():
            layer(torch.empty(2, 16)).sum().backward()
    sizes = {(message.op, message.size, message.processes) for message in counter.collectives}
    parts = processes // replicas
    expected = {("all_gather", 512.0, parts), ("reduce_scatter", 512.0, parts)}
    if replicas > 1:
        expected.add(("all_reduce", 512.0 / parts, replicas))
    assert sizes == expected
