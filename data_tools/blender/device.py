"""Blender's choice of a device: Cycles' name of the kind of GPU in lower case, or "cpu"."""

from typing import Any

#: Kinds of GPU that Cycles supports, the fastest on the same card first.
GPU_TYPES = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")


def enable_gpus(preferences: Any) -> str:  # noqa: ANN401 - Blender has no types
    """Enable every GPU of the first kind that is present; to be called after each factory reset.

    Args:
        preferences: Of the add-on: ``bpy.context.preferences.addons["cycles"].preferences``.

    Returns:
        The kind in lower case, "cpu" without a GPU.
    """
    for kind in GPU_TYPES:
        try:
            preferences.compute_device_type = kind
        except TypeError:  # this build of Blender does not support the kind
            continue
        devices = preferences.get_devices_for_type(kind)
        if devices:
            for device in devices:
                device.use = device.type == kind
            return kind.lower()
    preferences.compute_device_type = "NONE"
    return "cpu"


def cycles_device(device: str) -> str:
    """Return the value of ``scene.cycles.device`` for a device as named by ``enable_gpus``."""
    return "CPU" if device == "cpu" else "GPU"
