"""Tests of the gradient guard on hand-computed norms."""

import json
import math

import pytest
import torch

from lrm_pl.errors import InputError
from lrm_pl.kernels import device
from lrm_pl.training.gradient_guard import GradientGuard, GuardConfig


def accepts(judge, norm):
    return not judge.check(torch.tensor(norm)).item()


def guard(*norms, **config):
    judge = GradientGuard(GuardConfig(**config))
    assert [norm for norm in norms if not accepts(judge, norm)] == []
    return judge


def test_only_non_finite_norms_are_skipped_without_a_limit():
    judge = guard(1.0, 1e9, 1.0)
    assert not accepts(judge, math.nan)
    assert not accepts(judge, math.inf)
    assert (judge.num_skipped.item(), judge.consecutive_skips) == (2, 2)
    assert accepts(judge, 2.0)
    assert (judge.num_skipped.item(), judge.consecutive_skips) == (2, 0)


def test_norms_above_a_multiple_of_the_running_median_are_skipped():
    judge = guard(1.0, 2.0, 3.0, spike=5.0, window=3)
    assert not accepts(judge, 10.1)  # the median is 2
    assert accepts(judge, 9.9)  # and stays so: what was skipped does not count
    assert accepts(judge, 14.9)  # of 2, 3 and 9.9 it is 3
    assert not accepts(judge, 49.6)  # of 3, 9.9 and 14.9 it is 9.9


def test_the_median_of_an_even_number_of_norms_is_the_mean_of_the_middle_two():
    judge = guard(4.0, 1.0, 2.0, 8.0, spike=2.0, window=4)
    assert not accepts(judge, 6.1)  # the median is 3
    assert accepts(judge, 5.9)


def test_spikes_are_not_detected_until_the_window_is_full():
    judge = guard(1.0, 1.0, spike=2.0, window=3)
    assert accepts(judge, 1000.0)


def test_a_guard_is_exhausted_by_consecutive_spikes_and_reset_on_resume():
    judge = guard(*[0.1] * 4, spike=5.0, window=4, patience=3)
    for _ in range(3):
        assert not judge.exhausted
        assert not accepts(judge, 0.6)
    assert judge.exhausted
    assert judge.last == pytest.approx(0.6)
    assert judge.expectation == "gradient norms up to 5.0 times their running median, 0.1"
    assert judge.remedy == "raise --model.guard.spike"
    again = GradientGuard(judge.config)
    again.load_state(judge.state())
    assert not again.exhausted
    assert [accepts(again, 0.6) for _ in range(10)] == [True] * 10, "it has a new median"


def test_a_guard_with_a_patience_of_1_is_exhausted_by_one_skipped_step():
    judge = guard(1.0, patience=1)
    assert not judge.exhausted
    assert not accepts(judge, math.nan)
    assert judge.exhausted
    assert (judge.expectation, judge.remedy) == ("finite gradients", "train in 32-true")


def test_a_resumed_guard_makes_the_same_decisions():
    judge = guard(1.0, 2.0, 0.1, spike=5.0, window=3)
    assert not accepts(judge, 5.1)
    again = GradientGuard(judge.config)
    again.load_state(json.loads(json.dumps(judge.state())))
    assert again.state() == judge.state()
    assert judge.state() == {"skipped": 1, "consecutive": 1, "norms": [1.0, 2.0, torch.tensor(0.1).item()]}
    assert not accepts(again, 5.1)
    assert again.consecutive_skips == 2
    assert accepts(again, 4.9)


def test_a_smaller_window_of_a_resumed_run_keeps_the_newest_norms():
    again = GradientGuard(GuardConfig(spike=2.0, window=2))
    again.load_state(guard(9.0, 1.0, 3.0, window=5).state())
    assert not accepts(again, 4.1)  # the median is 2
    assert accepts(again, 3.9)


def test_exhausted_waits_for_the_device_only_if_the_newest_step_can_exhaust_the_patience(
    monkeypatch,
):
    judge = GradientGuard(GuardConfig(patience=3))
    waited = []
    numbers = device.HostCopy.numbers
    monkeypatch.setattr(device.HostCopy, "numbers", lambda copy: waited.append(copy) or numbers(copy))
    found = []
    for norm in (math.nan, 1.0, math.nan, math.nan, math.nan):
        judge.check(torch.tensor(norm))
        waited.clear()
        found.append((judge.exhausted, judge._reports[-1] in waited))
    assert found == [(False, False)] * 4 + [(True, True)]


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"window": 0}, {"spike": 1.0}])
def test_invalid_limits_are_rejected(wrong):
    with pytest.raises(InputError, match="expected patience and window of at least 1 and a spike above 1"):
        GuardConfig(**wrong)
