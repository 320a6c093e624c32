"""The interface between the renderer and a radiance field."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # for the shape checks in tests
class Field(Protocol):
    """Radiance fields of B objects: features that are linear in an object's planes, and a shared decoder.

    The two steps are separate for deferred back-propagation: the gradient of sampling is accumulated in place over
    chunks, and only the decoder needs an autograd graph.
    """

    @property
    def planes(self) -> Float[Tensor, "B *plane"]:
        """Feature planes of each object; differentiable."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weights of the shared decoder; differentiable."""

    def sample(self, planes: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q G"]:
        """Sample features of one object at points."""

    def accumulate(
        self, total: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"], grad: Float[Tensor, "Q G"]
    ) -> None:
        """Add the gradient of ``sample`` with respect to the planes to ``total`` in place."""

    def decode(
        self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q 3"]]:
        """Decode features to raw density and color, both float32; pure."""

    def activate(self, raw: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Map raw density to non-negative density per unit length; pure."""
