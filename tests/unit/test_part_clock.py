import time

import pytest
import torch

from lrm_pl.callbacks import part_clock
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


class Queue:
    """Stands in for a GPU: its time passes with the work that it is given, and events are recorded in it."""

    def __init__(self):
        self.now, self.recorded, self.waits = 0.0, [], 0

    def event(self, *, enable_timing):
        assert enable_timing
        return QueueEvent(self)


class QueueEvent(torch.cuda.Event):
    def __new__(cls, _):
        return super().__new__(cls, enable_timing=True)

    def __init__(self, queue):
        self.queue = queue

    def record(self, stream):
        self.at = self.queue.now
        self.queue.recorded.append(stream)

    def synchronize(self):
        self.queue.waits += 1

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpus_time_is_read_from_events_and_only_taking_it_waits(monkeypatch):
    queue, cpu = Queue(), torch.device("cpu")
    monkeypatch.setattr(part_clock, "on_cuda", lambda _: True)
    monkeypatch.setattr(torch.cpu, "Event", queue.event)
    clock = PartClock(cpu)
    assert clock.take() == {}
    for part, milliseconds in (("work", 5), ("rest", 2), ("work", 4)):
        clock.switch(part)
        queue.now += milliseconds
    assert queue.waits == 0
    assert clock.take() == {"work": 9.0, "rest": 2.0}
    queue.now += 3
    clock.rename("pause")
    assert clock.take() == {"pause": 3.0}
    assert queue.waits == 2
    assert queue.recorded == [torch.cpu.current_stream(cpu)] * 5


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
