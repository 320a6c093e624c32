"""The interface between the renderer and a radiance field."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # for the shape checks in tests
class Field(Protocol):
    """Radiance fields of B objects.

    A field consists of features that are linear in the planes of an object, and a decoder that all objects share.
    Sampling and decoding are separate because deferred back-propagation accumulates the gradient of sampling in place,
    so that only the decoder needs an autograd graph.
    """

    @property
    def planes(self) -> Float[Tensor, "B *plane"]:
        """Differentiable feature planes of each object."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Differentiable weights of the shared decoder."""

    def sample(self, planes: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q G"]:
        """Sample the features of one object at the given points."""

    def accumulate(
        self, total: Float[Tensor, "*plane"], points: Float[Tensor, "Q 3"], grad: Float[Tensor, "Q G"]
    ) -> None:
        """Add the gradient of ``sample`` with respect to the planes to ``total`` in place."""

    def decode(
        self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q 3"]]:
        """Decode features to raw densities and colors in float32.

        Implementations must be pure functions.
        """

    def activate(self, raw: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Map raw densities to non-negative densities per unit of length.

        Implementations must be pure functions.
        """
