"""Compile the kernels of the fused decoder for several GPUs, and report registers, spills and instructions.

``python -m tests.fused.build [ARCH...]`` prints a table. No GPU is required.
"""

import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from lrm_pl.kernels import decode_along_rays_triton as kernels
from lrm_pl.kernels.decode_along_rays import EMPTY_RAW_DENSITY, NUM_WARPS, TILES, WINDOW

#: Version of Triton with which the bounds were measured. Register allocation differs between versions.
MEASURED = "3.8.0"

TARGETS = {
    **{f"sm_{version}": GPUTarget("cuda", version, 32) for version in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Width, number of hidden layers and whether the activation is SiLU, for the decoders of configs/model and others.
MLPS = (
    (64, 8, False),
    (64, 8, True),
    (64, 2, False),
    (64, 1, True),
    (32, 1, False),
    (32, 8, True),
    (16, 2, False),
)

INPUTS = {"origins": "*fp32", "directions": "*fp32", "t": "*fp32", "alive": "*i8"}
NUMBERS = {"tiles": "i32", "N": "i32", "W": "i32", "K": "i32"}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel for one architecture."""

    kernel: str
    arch: str
    width: int
    tile: tuple[int, int, int]
    half: bool
    layers: int
    silu: bool
    registers: int
    spilled: int
    shared: int
    tensor_cores: int
    two_byte_loads: int
    vector_atomics: int
    atomics: int

    def __str__(self):
        precision, act = "bf16" if self.half else "fp32", "SiLU" if self.silu else "ReLU"
        return (
            f"{self.kernel:8} {self.arch:7} {precision} width {self.width:3} "
            f"{self.layers} {act} tile {self.tile}: "
            f"{self.registers:3} registers, {self.spilled:5} bytes spilled, {self.shared:6} bytes shared, "
            f"{self.tensor_cores} tensor-core products, {self.two_byte_loads} two-byte loads, "
            f"{self.vector_atomics} vector atomics"
        )


def build(kernel, arch, width=64, tile=(4, 4, 4), half=True, layers=8, silu=False):
    number = "*bf16" if half else "*fp32"
    names = {"planes": number, **INPUTS, "weights": number, "biases": "*fp32"}
    if kernel == "forward":
        signature = {**names, "out": "*fp32", **NUMBERS}
        more = {"EMPTY_RAW_DENSITY": EMPTY_RAW_DENSITY}
    else:
        names.pop("planes")
        signature = {"planes": number, "planes_grad": "*fp32", **names, "g": "*fp32", "dw": "*fp32", "db": "*fp32",
                     "scratch": number, **NUMBERS}  # fmt: skip
        more = {"WINDOW": WINDOW}
    constants = {"S": 64, "C": width, "L": layers, **dict(zip(("TH", "TW", "TK"), tile, strict=True)),
                 "AXES": (0, 1, 0, 2, 1, 2), "SILU": silu, "HALF": half, **more}  # fmt: skip
    # As in the JIT, allocations are aligned, and images and samples have sizes divisible by 16.
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in ("W", "K")]
    source = ASTSource(
        fn=getattr(kernels, kernel),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = compile(source, target=TARGETS[arch], options={"num_warps": NUM_WARPS, "num_stages": 1})
    common = kernel, arch, width, tile, half, layers, silu
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"{word}: *([0-9]+)", text)[1]) for word in ("vgpr_count", "vgpr_spill_count")
        )
        return Build(*common, registers, 4 * spilled, built.metadata.shared, text.count("v_mfma"), 0, 0, 0)
    ptx = built.asm["ptx"]
    log = assemble(ptx)
    return Build(
        *common,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=built.metadata.shared,
        tensor_cores=sum(ptx.count(word) for word in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")),
        two_byte_loads=ptx.count("ld.global.b16"),
        vector_atomics=len(re.findall(r"(?:atom|red)\.global[.a-z0-9]*\.v4\.f32", ptx)),
        atomics=len(re.findall(r"\b(?:atom|red)\.global", ptx)),
    )


def assemble(ptx):
    """Assemble PTX and return the registers and spills reported by ptxas."""
    arch = re.search(r"\.target (\w+)", ptx)[1]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = folder / ("ptxas-blackwell" if arch.startswith(("sm_10", "sm_12")) else "ptxas")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kernel.ptx"
        path.write_text(ptx)
        command = [program, "-v", f"--gpu-name={arch}", path, "-o", Path(place) / "kernel.cubin"]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stderr


def builds(arch):
    """Build every kernel variant that is used on an architecture."""
    for (width, layers, silu), (dtype, tiles) in itertools.product(MLPS, TILES.items()):
        for tile, kernel in itertools.product(tiles, ("forward", "backward")):
            yield build(kernel, arch, width, tile, dtype == torch.bfloat16, layers, silu)


if __name__ == "__main__":
    print(f"triton {triton.__version__}")
    for arch in sys.argv[1:] or TARGETS:
        for found in builds(arch):
            print(found, flush=True)
        for kernel in ("forward", "backward"):
            print(build(kernel, arch, 128), "- not used", flush=True)
