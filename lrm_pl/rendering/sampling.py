"""Where to sample a ray: stratified distances. Pure, float32."""

import torch
from jaxtyping import Float
from torch import Tensor


def stratified(
    near: Float[Tensor, "*rays"],
    far: Float[Tensor, "*rays"],
    samples: int,
    jitter: Float[Tensor, "*rays"] | None,
) -> tuple[Float[Tensor, "*rays K"], Float[Tensor, "*rays"]]:
    """Put one sample into each of K equal bins of [near, far].

    Args:
        near: (...) start of the interval.
        far: (...) end of the interval.
        samples: K.
        jitter: (...) in [0, 1), the place inside the bin, one number a ray (shifting all its samples together
            keeps them evenly spaced: less noise than K independent draws); None takes the middle.

    Returns:
        ``t`` (..., K) and the length of a bin (...).
    """
    width = (far - near) / samples
    steps = torch.arange(samples, dtype=torch.float32, device=near.device)
    place = steps + 0.5 if jitter is None else steps + jitter.unsqueeze(-1)
    return near.unsqueeze(-1) + place * width.unsqueeze(-1), width
