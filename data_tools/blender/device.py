"""Selection of the device for Cycles."""

from typing import Any

#: GPU backends of Cycles, in order of decreasing speed.
GPU_BACKENDS = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")


def enable_gpus(preferences: Any) -> str:  # noqa: ANN401 - Blender has no types
    """Enable all GPUs of the first available backend.

    A factory reset disables the GPUs, so this function must be called after each reset.

    Args:
        preferences: The object ``bpy.context.preferences.addons["cycles"].preferences``.

    Returns:
        Name of the backend in lower case, or "cpu" if no GPU is available.
    """
    for backend in GPU_BACKENDS:
        try:
            preferences.compute_device_type = backend
        except TypeError:  # not supported by this build of Blender
            continue
        devices = preferences.get_devices_for_type(backend)
        if devices:
            for device in devices:
                device.use = device.type == backend
            return backend.lower()
    preferences.compute_device_type = "NONE"
    return "cpu"


def cycles_device(backend: str) -> str:
    """Return the value of ``scene.cycles.device`` for a backend returned by ``enable_gpus``."""
    return "CPU" if backend == "cpu" else "GPU"
