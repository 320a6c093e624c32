"""Check that tests run all branches for accelerators.

Branches that depend on ``on_cuda`` require CUDA. They are listed with a test in ``make test-gpu`` that runs them.
"""

import ast

import pytest

from tests import ROOT
from tests.accelerator.branches import RECORD, Record, find, find_in

FOLDERS = ("tests/accelerator", "tests/gpu")

#: Tests that run several of the functions below.
STEP = "tests/gpu/test_training.py::test_training_with_each_trainer_config_matches_a_cpu"
MODEL = "tests/accelerator/test_models.py::test_training_validation_and_checkpoint_match_a_cpu"
TRACE = "tests/gpu/test_training.py::test_a_run_is_timed_and_traced"
RENDER = "tests/gpu/test_rendering.py::test_deferred_rendering_matches_the_reference_in_values_and_gradients"

#: Functions that call ``on_cuda``, and a test that runs them on a GPU.
ON_CUDA = {
    "lrm_pl/planning/memory.py:peak_memory": TRACE,
    "lrm_pl/callbacks/phase_clock.py:PhaseClock._now": TRACE,
    "lrm_pl/callbacks/phase_clock.py:PhaseClock.pop_totals": TRACE,
    "lrm_pl/callbacks/trace.py:TraceRecorder.on_train_start": TRACE,
    "lrm_pl/callbacks/utilization.py:UtilizationMeter.utilization": TRACE,
    "lrm_pl/data/batch.py:PackedBatch.to": MODEL,
    "lrm_pl/data/datamodule.py:ShardDataModule._loader": MODEL,
    "lrm_pl/kernels/decode_along_rays.py:decode_along_rays": RENDER,
    "lrm_pl/kernels/decode_along_rays.py:accumulate_gradient": RENDER,
    "lrm_pl/kernels/decode_along_rays.py:_launch": RENDER,
    "lrm_pl/kernels/decode_along_rays.py:_op": RENDER,
    "lrm_pl/kernels/decode_along_rays.py:_backward_op": RENDER,
    "lrm_pl/kernels/device.py:CopyStream.__init__": MODEL,
    "lrm_pl/kernels/device.py:HostCopy.__init__": MODEL,
    "lrm_pl/kernels/device.py:gpu_properties": RENDER,
    "lrm_pl/kernels/device.py:host_buffer": MODEL,
    "lrm_pl/kernels/device.py:launch_guard": RENDER,
    "lrm_pl/kernels/device.py:peak_device_memory": TRACE,
    "lrm_pl/kernels/device.py:profiler_activities": TRACE,
    "lrm_pl/kernels/device.py:triton_unavailable": RENDER,
    "lrm_pl/kernels/modulated_norm.py:modulated_norm": MODEL,
    "lrm_pl/kernels/modulated_norm.py:_op": MODEL,
    "lrm_pl/kernels/modulated_norm.py:_backward_op": MODEL,
    "lrm_pl/rendering/fused.py:_unsupported_reason": RENDER,
    "lrm_pl/planning/gpus.py:peak_flops": TRACE,
    "lrm_pl/training/sharded_state.py:Snapshots._copied": MODEL,
}


#: Functions that check the GPU of an estimate, and a test that runs them.
ESTIMATES = {
    "lrm_pl/planning/kernel_bytes.py:_backward_access": "tests/unit/test_simulation.py",
}


def names_of_tests(folder):
    """Return the node IDs of the test functions in a folder."""
    return {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in sorted((ROOT / folder).glob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_all_device_checks_and_branches_run_for_a_cpu_and_an_accelerator(request):
    known = set().union(*map(names_of_tests, FOLDERS))
    if not known <= {f"{item.path.relative_to(ROOT)}::{item.originalname}" for item in request.session.items}:
        pytest.skip(f"requires all tests in {' and '.join(FOLDERS)}")
    assert RECORD.missing(*find()) == []


def test_functions_that_check_for_cuda_are_listed_with_a_gpu_test():
    assert {f"{check.file}:{check.function}" for check in find("on_cuda")[0]} == (
        ON_CUDA.keys() | ESTIMATES.keys()
    )
    assert all((ROOT / path).is_file() for path in ESTIMATES.values())
    for test in set(ON_CUDA.values()):
        path, name = test.split("::")
        functions = {
            node.name: {argument.arg for argument in node.args.args}
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert functions[name] & {"device", "trained"}, f"{test} does not run on a GPU"


BRANCH = """
from lrm_pl.kernels.device import on_cpu
def ask(x):
    if on_cpu(x):
        return 1
    elif x.ndim:
        return 2
    return 3
"""


def test_only_branches_that_did_not_run_are_reported():
    checks, statements = find_in("some.py", BRANCH)
    assert [str(check) for check in checks] == ["some.py:4 in ask"]
    assert [statement.first for statement in statements] == [5, 6, 7]
    path, record = str(ROOT / "some.py"), Record()
    record.results[path, 4] = {True}
    record.lines |= {(path, 5), (path, 6)}
    expected = ["some.py:4 in ask was not called as an accelerator", "some.py:7 did not run"]
    assert record.missing(checks, statements) == expected
    record.results[path, 4].add(False)
    record.lines.add((path, 7))
    assert record.missing(checks, statements) == []


def test_functions_of_other_modules_with_the_same_name_are_not_device_checks():
    assert find_in("some.py", BRANCH.replace("from lrm_pl.kernels.device", "from elsewhere"))[0] == []
