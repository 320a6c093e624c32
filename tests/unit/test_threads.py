"""Tests of ``run_threads`` and of the number of intra-op threads in other threads."""

import threading

import pytest
import torch

from lrm_pl.kernels.attention import attention_in_blocks
from lrm_pl.kernels.threads import run_threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_start_later_have_the_usual_number_of_intra_op_threads():
    inside, meanwhile = [], []

    def work(number):
        inside.append((number, torch.get_num_threads()))
        meanwhile.append(in_a_new_thread())

    run_threads(2, work)
    assert sorted(inside) == [(0, 1), (1, 1)]
    assert meanwhile == [3, 3]
    assert (torch.get_num_threads(), in_a_new_thread()) == (3, 3)


def test_multithreaded_operations_do_not_change_the_number_of_intra_op_threads():
    attention_in_blocks(*torch.rand(3, 1, 4, 300, 16))
    assert in_a_new_thread() == 3


def test_an_error_in_a_thread_is_raised():
    def work(number):
        if number:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_threads(2, work)
    assert in_a_new_thread() == 3
