import math

import pytest
import torch

from lrm_pl.losses.objective import LossInputs, Objective
from lrm_pl.losses.photometric import mask_loss
from lrm_pl.losses.regularizers import opacity_prior, total_variation


def evidence(prediction=0.5, target=0.3, opacity=0.25, alpha=1.0, planes=None):
    def full(value, *shape):
        return torch.full((2, *shape, 4, 4), value)

    planes = torch.zeros(1, 3, 2, 4, 4) if planes is None else planes
    return LossInputs(full(prediction, 3), full(target, 3), full(opacity), full(alpha), planes)


def test_the_objective_is_the_weighted_mse_before_lpips_starts():
    terms = Objective(mse=3.0, lpips=2.0, lpips_start_step=5)(evidence(), step=4)
    assert terms.keys() == {"mse"}
    assert math.isclose(terms["mse"].item(), 3 * 0.04, rel_tol=1e-5)


def test_weighted_lpips_is_added_at_its_start_step():
    objective = Objective(mse=1.0, lpips=2.0, lpips_start_step=5)
    objective.perceptual = lambda prediction, target: torch.tensor([0.1, 0.3])
    assert math.isclose(objective(evidence(), step=5)["lpips"].item(), 0.4, rel_tol=1e-5)


def test_lpips_without_a_network_is_an_error():
    with pytest.raises(ValueError, match=r"--model\.objective\.lpips 0"):
        Objective()(evidence(), step=0)


def test_the_mask_term_equals_the_cross_entropy_computed_by_hand():
    # Covered pixels seen with opacity 1/4 cost -log(1/4); bare ones -log(3/4).
    terms = Objective(mse=0.0, lpips=0.0, mask=0.05)(evidence(), step=0)
    assert terms.keys() == {"mask"}
    assert math.isclose(terms["mask"].item(), 0.05 * -math.log(0.25), rel_tol=1e-3)
    bare = Objective(mse=0.0, lpips=0.0, mask=1.0)(evidence(alpha=0.0), step=0)
    assert math.isclose(bare["mask"].item(), -math.log(0.75), rel_tol=1e-3)


def test_the_mask_term_and_its_gradient_are_finite_for_wrong_opacities():
    opacity = torch.tensor([[[0.0, 1.0 + 1e-7], [1.0, 0.0]]], requires_grad=True)
    loss = mask_loss(opacity, torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert opacity.grad.isfinite().all()
    assert opacity.grad[0, 0, 0] < -100, "a clear pixel of the object is pulled up"
    assert opacity.grad[0, 0, 1] > 100, "a floater is pulled down, though rounding left [0, 1]"


def test_total_variation_equals_the_value_computed_by_hand():
    # A ramp of 0.5 a column: every horizontal difference is 0.5, every vertical one 0.
    ramp = (torch.arange(4.0) * 0.5).expand(1, 3, 2, 4, 4)
    assert math.isclose(total_variation(ramp).item(), 0.25, rel_tol=1e-6)
    assert math.isclose(total_variation(ramp.transpose(-1, -2)).item(), 0.25, rel_tol=1e-6)
    terms = Objective(mse=0.0, lpips=0.0, tv=5e-4)(evidence(planes=ramp), step=0)
    assert math.isclose(terms["tv"].item(), 5e-4 * 0.25, rel_tol=1e-6)


def test_the_opacity_prior_is_zero_at_0_and_1_and_largest_at_one_half():
    prior = [opacity_prior(torch.full((1, 1, 1), x)).item() for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert prior[0] == pytest.approx(0, abs=1e-6)
    assert prior[4] == pytest.approx(0, abs=1e-6)
    assert prior[2] == pytest.approx(2 * math.log(0.6) - math.log(0.11))
    assert prior[1] == pytest.approx(prior[3])
    assert prior[1] < prior[2]
    half = Objective(mse=0.0, lpips=0.0, opacity=0.1)(evidence(opacity=0.5), step=0)["opacity"]
    assert half.item() == pytest.approx(0.1 * prior[2])


def test_negative_weights_are_rejected():
    with pytest.raises(ValueError, match="non-negative weights"):
        Objective(tv=-1.0)
