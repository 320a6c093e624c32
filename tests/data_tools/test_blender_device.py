from types import SimpleNamespace

import pytest

from data_tools.blender.device import enable_gpus


class Preferences:
    """Fake of Cycles' preferences: unknown backends raise TypeError, and CPUs are listed with GPUs."""

    def __init__(self, known, present):
        self.known, self.present, self.kind = known, present, "NONE"

    @property
    def compute_device_type(self):
        return self.kind

    @compute_device_type.setter
    def compute_device_type(self, kind):
        if kind not in {*self.known, "NONE"}:
            raise TypeError(f"enum {kind!r} not found")
        self.kind = kind

    def get_devices_for_type(self, kind):
        return [d for d in self.present if d.type in (kind, "CPU")] if kind in self.kinds else []

    @property
    def kinds(self):
        return {d.type for d in self.present}


def device(kind):
    return SimpleNamespace(type=kind, use=True)


@pytest.mark.parametrize(
    ("known", "present", "chosen"),
    [
        (("OPTIX", "CUDA"), ("CUDA", "OPTIX", "CPU"), "optix"),
        (("CUDA",), ("CUDA", "OPTIX", "CPU"), "cuda"),
        (("OPTIX", "CUDA", "HIP"), ("HIP", "CPU"), "hip"),
        (("OPTIX", "CUDA"), ("CPU",), "cpu"),
        ((), (), "cpu"),
    ],
)
def test_cycles_uses_all_gpus_of_the_fastest_backend_and_no_cpu(known, present, chosen):
    devices = [device(kind) for kind in present]
    preferences = Preferences(known, devices)
    assert enable_gpus(preferences) == chosen
    if chosen == "cpu":
        assert preferences.compute_device_type == "NONE"
        return
    assert preferences.compute_device_type == chosen.upper()
    offered = preferences.get_devices_for_type(chosen.upper())
    assert {d.type for d in offered if d.use} == {chosen.upper()}
