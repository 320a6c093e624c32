"""Tests of the kernels of the modulated norm without a GPU, with Triton's interpreter and compiler."""

import re

import pytest
import torch
import triton
from triton.compiler import ASTSource, compile

from lrm_pl.kernels import device
from lrm_pl.kernels import modulated_norm as norm
from lrm_pl.kernels import modulated_norm_triton as kernels
from lrm_pl.models.transformer import ModLN
from tests.fused.build import MEASURED, TARGETS, assemble
from tests.fused.triton_process import interpreted


@pytest.mark.slow
def test_interpreted_kernels_match_the_reference_and_save_only_the_input():
    assert "5 passed, 0 failed" in interpreted("tests.fused.interpreted_norm")


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ != MEASURED, reason=f"measured with Triton {MEASURED}")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_kernels_of_width_1024_do_not_spill_and_use_vector_loads_and_stores(kernel, arch):
    names = kernels.forward.arg_names if kernel == "forward" else kernels.backward.arg_names
    sizes = {"L": "i32", "D": "i32", "eps": "fp32"}
    signature = {name: sizes.get(name, "*fp32") for name in names[:-1]} | {"BLOCK": "constexpr"}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind == "*fp32" or name == "D"]
    built = compile(
        ASTSource(
            fn=getattr(kernels, kernel),
            signature=signature,
            constexprs={"BLOCK": 1024},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=TARGETS[arch],
        options={"num_warps": norm._sizes(torch.empty(2, 3, 1024))["num_warps"]},
    )
    log = assemble(built.asm["ptx"])
    print(kernel, arch, re.search(r"Used \d+ registers", log)[0])
    assert "0 bytes spill stores" in log
    assert "ld.global.v4.b32" in built.asm["ptx"]
    assert "st.global.v4.b32" in built.asm["ptx"]
    assert not re.search(r"\b(?:atom|red)\.global", built.asm["ptx"])  # the results are bitwise reproducible


def test_the_modulated_norm_is_one_operation_if_triton_is_available(
    monkeypatch,
):
    calls = []
    monkeypatch.setattr(norm, "triton_unavailable", lambda _: None)
    monkeypatch.setattr(torch.ops.lrm_pl, "modulated_norm", lambda *given: calls.append(given) or [given[0]])
    layer, x, camera = ModLN(6, 3), torch.randn(4, 5, 6), torch.randn(4, 3)
    expected = norm.modulated_norm_plain(x, torch.ones(4, 6), torch.zeros(4, 6), 1e-6)
    assert torch.equal(layer(x, camera), expected)
    assert not calls
    with device.as_accelerator():
        layer(x, camera)
        assert len(calls) == 1
        monkeypatch.setattr(norm, "triton_unavailable", lambda _: "this GPU is too old")
        assert torch.equal(layer(x, camera), expected)
    assert len(calls) == 1
