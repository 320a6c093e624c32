import time

import pytest
import torch

from lrm_pl.callbacks import phase_clock
from lrm_pl.callbacks.phase_clock import PhaseClock


def test_elapsed_time_is_attributed_to_the_active_phase():
    clock = PhaseClock(torch.device("cpu"))
    assert clock.pop_totals() == {}
    began = time.perf_counter()
    for part in ("work", "rest", "work"):
        clock.switch(part)
        time.sleep(0.01)
    first = clock.pop_totals()
    time.sleep(0.02)
    clock.rename("pause")
    time.sleep(0.02)
    clock.switch("rest")
    second = clock.pop_totals()
    passed = 1000 * (time.perf_counter() - began)
    assert first["work"] >= 20
    assert first["rest"] >= 10
    assert second["pause"] >= 40
    assert sum(first.values()) + sum(second.values()) == pytest.approx(passed, rel=0.05)


class Queue:
    """Simulated GPU queue with its own time, in which events are recorded."""

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


def test_gpu_time_is_measured_with_events(monkeypatch):
    queue, cpu = Queue(), torch.device("cpu")
    monkeypatch.setattr(phase_clock, "on_cuda", lambda _: True)
    monkeypatch.setattr(torch.cpu, "Event", queue.event)
    clock = PhaseClock(cpu)
    assert clock.pop_totals() == {}
    for part, milliseconds in (("work", 5), ("rest", 2), ("work", 4)):
        clock.switch(part)
        queue.now += milliseconds
    assert queue.waits == 0
    assert clock.pop_totals() == {"work": 9.0, "rest": 2.0}
    queue.now += 3
    clock.rename("pause")
    assert clock.pop_totals() == {"pause": 3.0}
    assert queue.waits == 2
    assert queue.recorded == [torch.cpu.current_stream(cpu)] * 5


@pytest.mark.gpu
def test_switching_phases_does_not_synchronize_with_the_gpu():
    clock = PhaseClock(torch.device("cuda"))
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix  # starts cuBLAS
    torch.cuda.synchronize()
    began = time.perf_counter()
    clock.switch("work")
    for _ in range(20):
        matrix @ matrix
    clock.switch("rest")
    asked = 1000 * (time.perf_counter() - began)
    spent = clock.pop_totals()
    assert spent["work"] > 2 * asked
    assert spent["rest"] < spent["work"]
