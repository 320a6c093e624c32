import ast
import contextlib

import pytest
import torch

from lrm_pl.errors import InputError
from lrm_pl.kernels import device
from tests import ROOT

#: Files that may compare devices: one for PyTorch, one for Blender.
ALLOWED = {"lrm_pl/kernels/device.py", "data_tools/blender/device.py"}

DEVICE_TYPES = {"cpu", "cuda", "mps", "xpu", "hip"}


def device_comparisons(source):
    """Yield the line of every comparison of a device and of every check for CUDA."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            constants = {c.value for o in operands for c in ast.walk(o) if isinstance(c, ast.Constant)}
            attributes = {o.attr for o in operands if isinstance(o, ast.Attribute)}
            if constants & DEVICE_TYPES or "device" in attributes:
                yield node.lineno
        if isinstance(node, ast.Attribute) and node.attr in {"is_cuda", "is_cpu", "is_available"}:
            if node.attr != "is_available" or "cuda" in ast.unparse(node.value):
                yield node.lineno


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x.device.type == 'cpu'", True),
        ("kind in ('gpu', 'cuda')", True),
        ("a.device != b.device", True),
        ("torch.cuda.is_available()", True),
        ("x.is_cuda", True),
        ("torch.distributed.is_available()", False),
        ("node.type == 'TEX_IMAGE'", False),
    ],
)
def test_a_device_comparison_is_recognized(line, found):
    assert bool(list(device_comparisons(line))) is found


def test_devices_are_compared_in_one_file_only():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in ("lrm_pl", "data_tools")
        for path in sorted((ROOT / package).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in ALLOWED
        for line in device_comparisons(path.read_text())
    ]
    assert not found


def test_cpu_tensors_take_the_branches_for_accelerators_without_host_types(monkeypatch):
    assert device.on_cpu(torch.zeros(1))
    assert device.num_threads(torch.device("cpu")) == torch.get_num_threads()
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    assert not device.on_cpu(torch.zeros(1))
    assert not device.on_cpu(torch.device("cpu"))
    assert device.num_threads(torch.device("cpu")) == 1
    assert device.points_per_chunk(torch.device("cpu")) == 262144


def test_each_process_of_a_node_uses_a_different_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert device.choose_device("auto", local_rank=2) == torch.device("cuda:2")
    assert device.choose_device("cuda", local_rank=5) == torch.device("cuda:1")
    assert device.choose_device("cuda:3", local_rank=1) == torch.device("cuda:3")
    assert device.num_visible_gpus("cpu") == 0
    assert device.num_visible_gpus("auto") == device.num_visible_gpus("gpu") == 4


def test_synchronize_waits_for_the_given_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device.synchronize(torch.device("cuda:3"))
    assert waited == [torch.device("cuda:3")]


@pytest.mark.parametrize("name", ["meta", "cuda:99", "nonsense"])
def test_an_unavailable_device_is_an_error(name):
    with pytest.raises(InputError, match=name):
        device.choose_device(name)


def tf32_switches():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.usefixtures("matmul_precision")
def test_without_tf32_restores_the_settings(precision):
    torch.set_float32_matmul_precision(precision)
    assert tf32_switches() == (True, precision)  # PyTorch's default for convolutions
    with device.without_tf32():
        assert tf32_switches() == (False, "highest")
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        with device.without_tf32():
            pass
        assert tf32_switches() == (False, "highest")
    assert tf32_switches() == (True, precision)
    with pytest.raises(KeyError), device.without_tf32():
        raise KeyError
    assert tf32_switches() == (True, precision)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def launches(source):
    """Yield the line of every Triton launch, ``kernels.name[grid](...)``, and whether a launch guard encloses it."""

    def visit(node, guarded):
        if isinstance(node, ast.With):
            guarded |= any("launch_guard(" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            if ast.unparse(node.func.value).startswith("kernels."):
                yield node.lineno, guarded
        for child in ast.iter_child_nodes(node):
            yield from visit(child, guarded)

    yield from visit(ast.parse(source), False)


def test_a_launch_without_a_guard_is_found():
    source = "kernels.forward[(1,)](x)\nwith launch_guard(x.device):\n    kernels.forward[(1,)](x)"
    assert list(launches(source)) == [(1, False), (3, True)]


def test_all_triton_launches_have_a_guard():
    found = [
        (path.name, line, guarded)
        for path in sorted((ROOT / "lrm_pl").rglob("*.py"))
        for line, guarded in launches(path.read_text())
    ]
    assert len(found) >= 4
    assert all(guarded for *_, guarded in found), found


def test_the_launch_guard_of_a_gpu_and_a_cpu(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda which: entered.append(which) or contextlib.nullcontext())
    with device.launch_guard(torch.device("cuda:3")), device.launch_guard(torch.device("cpu")):
        assert entered == [torch.device("cuda:3")]


class WithoutStreams:
    """Device module with events but without streams, such as MPS."""

    Event = torch.cpu.Event if hasattr(torch.cpu, "Event") else object


def test_copies_on_a_device_without_streams_are_synchronous(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: WithoutStreams)
    stream, source, into = device.CopyStream(torch.device("cpu")), torch.arange(3.0), torch.zeros(3)
    with stream.after_current():
        stream.copy(into, source)
    stream.block_current()
    stream.synchronize()
    assert torch.equal(into, source)
    assert device.HostCopy(source).numbers() == [0, 1, 2]


@pytest.mark.parametrize("name", ["hpu", "privateuseone", "cuda:99", "nonsense", "meta"])
def test_a_nonexistent_device_is_an_error(name):
    with pytest.raises(InputError, match=f"expected a device such as cpu or cuda, but found '{name}'"):
        device.choose_device(name)
