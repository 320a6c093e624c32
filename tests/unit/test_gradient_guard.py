"""Which steps are left out: norms judged by hand."""

import math

import pytest

from lrm_pl.errors import InputError
from lrm_pl.training.gradients import GradientGuard, GuardConfig


def guard(*norms, **config):
    judge = GradientGuard(GuardConfig(**config))
    assert [norm for norm in norms if not judge.accepts(norm)] == []
    return judge


def test_without_a_limit_only_what_is_not_finite_is_left_out_and_counted():
    judge = guard(1.0, 1e9, 1.0)
    assert not judge.accepts(math.nan)
    assert not judge.accepts(math.inf)
    assert (judge.skipped, judge.in_a_row) == (2, 2)
    assert judge.accepts(2.0)
    assert (judge.skipped, judge.in_a_row) == (2, 0)


def test_a_norm_above_so_many_times_the_running_median_is_left_out():
    judge = guard(1.0, 2.0, 3.0, spike=5.0, window=3)
    assert not judge.accepts(10.1)  # the median is 2
    assert judge.accepts(9.9)  # and stays so: what was left out does not count
    assert judge.accepts(14.9)  # of 2, 3 and 9.9 it is 3
    assert not judge.accepts(49.6)  # of 3, 9.9 and 14.9 it is 9.9


def test_before_the_window_is_full_nothing_is_called_a_spike():
    judge = guard(1.0, 1.0, spike=2.0, window=3)
    assert judge.accepts(1000.0)


def test_norms_that_stay_larger_stop_the_run_with_what_to_do_and_the_next_start_goes_on():
    judge = guard(*[0.1] * 4, spike=5.0, window=4, patience=3)
    assert [judge.accepts(0.6) for _ in range(3)] == [False] * 3
    assert judge.exhausted
    assert judge.expectation == "gradient norms up to 5.0 times their running median, 0.1"
    assert judge.remedy == "raise --model.guard.spike"
    again = GradientGuard(judge.config)
    again.resume(judge.state())
    assert not again.exhausted
    assert [again.accepts(0.6) for _ in range(10)] == [True] * 10, "it has a new median"


def test_a_resumed_guard_judges_as_the_one_that_was_saved():
    judge = guard(1.0, 2.0, 3.0, spike=5.0, window=3)
    assert not judge.accepts(10.1)
    again = GradientGuard(judge.config)
    again.resume(judge.state())
    assert again.state() == judge.state()
    assert not again.accepts(10.1)


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"window": 0}, {"spike": 1.0}])
def test_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="expected patience and window of at least 1 and a spike above 1"):
        GuardConfig(**wrong)
