"""What rendering asks of a field, and nothing else about it."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # so that shape checks in tests can look at it
class Field(Protocol):
    """The fields of B objects: features that are linear in an object's planes, then a decoder that all share.

    Rendering needs the two steps apart: the gradient of the first is added in place into one buffer, chunk after
    chunk, and only the second needs a graph.
    """

    @property
    def planes(self) -> Float[Tensor, "B *plane"]:
        """What each object owns; differentiable."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """What the decoder owns; differentiable."""

    def sample(self, planes: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q G"]:
        """Read features of one object at points."""

    def accumulate(
        self, total: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"], grad: Float[Tensor, "Q G"]
    ) -> None:
        """Add the planes' gradient of ``sample`` to ``total`` in place."""

    def decode(
        self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q 3"]]:
        """Turn features into raw density and color, both float32; a pure function of its arguments."""

    def activate(self, raw: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Turn raw density into density a unit of length, not negative; pure."""
