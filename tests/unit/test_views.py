"""Conversion of views to floats, compared with the reference implementations."""

import numpy as np
import pytest
import torch

from lrm_pl.kernels import device, views_numba
from lrm_pl.kernels.views import over_white, over_white_plain, resized_window, resized_window_plain


def bytes_of(height, width, seed=0):
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgba[: height // 3] = 0  # empty, as most of a render is
    return rgba


def test_over_white_by_hand():
    rgba = torch.tensor([[[255, 0, 51, 255], [255, 0, 51, 0], [255, 0, 51, 51]]], dtype=torch.uint8)
    images, alpha = over_white(rgba)
    assert torch.allclose(images[:, 0, 0], torch.tensor([1, 0, 0.2]))
    assert torch.equal(images[:, 0, 1], torch.ones(3))
    assert torch.allclose(images[:, 0, 2], torch.tensor([1, 0.8, 0.2 * 0.2 + 0.8]))
    assert torch.allclose(alpha, torch.tensor([[1, 0, 0.2]]))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4), (1, 64, 64, 4), (33, 20, 4)])
def test_over_white_is_bitwise_equal_to_the_reference(shape):
    rgba = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    for found, expected in zip(over_white(rgba), over_white_plain(rgba), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("height", "width", "side", "size"),
    [(512, 512, 384, 128), (512, 512, 128, 128), (512, 512, 129, 100), (64, 64, 64, 20), (64, 64, 63, 63),
     (48, 64, 37, 16), (40, 40, 100, 64), (7, 9, 1, 1)],
)  # fmt: skip
def test_a_resized_window_matches_a_crop_of_the_resized_view(height, width, side, size):
    rgba, spare = bytes_of(height, width), side - size
    for top, left in {(0, 0), (spare, spare), (0, spare), (spare // 2, spare // 3)}:
        found = resized_window(rgba, side, top, left, size)
        expected = resized_window_plain(rgba, side, top, left, size)
        assert found.shape == (4, size, size)
        assert (found - expected).abs().max() <= 3e-7


def test_views_on_an_accelerator_are_bitwise_equal_to_those_on_a_cpu(monkeypatch):
    rgba = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 3, 5, 7, 4), dtype=np.uint8))
    expected = over_white(rgba)
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    monkeypatch.delattr(views_numba, "over_white")
    for found, wanted in zip(over_white(rgba), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
