"""Compare the kernels of the modulated norm, run by Triton's interpreter, with the reference implementation.

Run ``TRITON_INTERPRET=1 python -m tests.fused.interpreted_norm``.
"""

import sys

import torch

from lrm_pl.kernels import device
from lrm_pl.kernels.modulated_norm import modulated_norm, modulated_norm_plain

BOUND = 2e-6


def differences(batch, length, dim):
    """Return the relative differences of values and of the gradients of x, weight and bias."""
    torch.manual_seed(0)
    x = 3 * torch.randn(batch, length, dim) + torch.randn(batch, length, 1)
    leaves = [x, torch.randn(batch, dim), torch.randn(batch, dim)]
    found = []
    grad = torch.randn(batch, dim, length).transpose(1, 2)  # not contiguous
    for body in (modulated_norm, modulated_norm_plain):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        values = body(*given, 1e-5)
        found.append([values.detach(), *torch.autograd.grad(values, given, grad)])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]


def main():
    """Print a line for each case, and check the schema and the fake implementation of the operator."""
    torch.set_num_threads(1)
    failed, device.HOST_TYPES = 0, frozenset()
    # The cases include a single row, widths that are not powers of two, and fewer rows than programs.
    cases = [(1, 1, 8), (2, 5, 6), (3, 40, 96), (2, 7, 1024), (20, 3, 16)]
    for case in cases:
        worst = max(differences(*case))
        print(case, f"{worst:.1e}")
        failed += worst > BOUND
    kept = []
    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.shape), lambda saved: saved
    ):
        modulated_norm(x, torch.ones(2, 6), torch.zeros(2, 6), 1e-5)
    failed += kept.count(x.shape) != 1
    given = (x, torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True), 1e-5)
    torch.library.opcheck(torch.ops.lrm_pl.modulated_norm.default, given)
    print(f"{len(cases) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
