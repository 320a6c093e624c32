import time

import pytest
import torch

from lrm_pl.callbacks.part_clock import PartClock


def test_all_time_belongs_to_the_part_that_runs_and_a_renamed_part_is_renamed_from_its_beginning():
    clock = PartClock(torch.device("cpu"))
    assert clock.take() == {}
    began = time.perf_counter()
    for part in ("work", "rest", "work"):
        clock.switch(part)
        time.sleep(0.01)
    first = clock.take()
    time.sleep(0.02)
    clock.rename("pause")
    time.sleep(0.02)
    clock.switch("rest")
    second = clock.take()
    passed = 1000 * (time.perf_counter() - began)
    assert first["work"] >= 20
    assert first["rest"] >= 10
    assert second["pause"] >= 40
    assert sum(first.values()) + sum(second.values()) == pytest.approx(passed, rel=0.05)


@pytest.mark.gpu
def test_on_a_gpu_time_is_the_gpus_and_setting_marks_does_not_wait_for_it():
    clock = PartClock(torch.device("cuda"))
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix  # starts cuBLAS
    torch.cuda.synchronize()
    began = time.perf_counter()
    clock.switch("work")
    for _ in range(20):
        matrix @ matrix
    clock.switch("rest")
    asked = 1000 * (time.perf_counter() - began)
    spent = clock.take()
    assert spent["work"] > 2 * asked
    assert spent["rest"] < spent["work"]
