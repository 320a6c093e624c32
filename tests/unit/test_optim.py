import math

import pytest
import torch

from lrm_pl.errors import InputError
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.training.optim import OptimizerConfig, parameter_groups, warmup_cosine
from tests.builders import tiny_lrm


def test_warm_up_and_cosine_equal_hand_computed_values():
    # 100 steps, 10 of warm-up: 0.1, 0.2, ..., 1.0, then a cosine that is at half its way at step 55.
    factors = [warmup_cosine(step, 100, 0.1, 0.0) for step in range(101)]
    assert math.isclose(factors[0], 0.1)
    assert math.isclose(factors[9], 1.0)
    assert math.isclose(factors[10], 1.0)
    assert math.isclose(factors[55], 0.5)
    assert math.isclose(factors[100], 0.0, abs_tol=1e-9)
    assert math.isclose(warmup_cosine(100, 100, 0.1, 0.25), 0.25)


def test_the_warm_up_of_a_short_run_ends():
    assert warmup_cosine(2, 3, 0.07, 0.0) < warmup_cosine(0, 3, 0.07, 0.0) == 1.0


def test_weight_decay_applies_only_to_linear_and_convolution_weights():
    model = tiny_lrm()
    decayed, spared = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    assert {"transformer.tokens", "transformer.norm.weight", "camera_embedder.mlp.0.bias"} <= spared_names
    assert {
        "transformer.blocks.0.self_attention.qkv.weight",
        "upsampler.deconvolution.weight",
    } <= decayed_names
    assert not any(name.endswith("bias") or "norm.norm" in name for name in decayed_names)
    assert decayed_names | spared_names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("encoder.") for name in decayed_names | spared_names), "it is frozen"


def test_the_optimizer_is_adamw_with_the_betas_of_the_paper():
    optimizer = OptimizerConfig().build(tiny_lrm())
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_layer_decay_lowers_the_learning_rate_of_earlier_blocks():
    torch.manual_seed(0)
    encoder = ImageEncoder("test_vit", image_size=32)
    model = LRM(encoder, NeRFDecoder(4, 8, 3), dim=16, depth=2, heads=2, camera_dim=8, plane_tokens=4)
    optimizer = OptimizerConfig(layer_decay=0.5).build(model)
    share = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(share) == len(list(model.parameters()))
    depth = len(encoder.vit.blocks)
    for module, blocks_behind in (
        (model.decoder, None), (model.upsampler, None), (model.transformer.norm, None),
        (model.transformer.blocks[1], 0), (model.transformer.blocks[0], 1), (model.camera_embedder, 2),
        (encoder.vit.blocks[-1], 2), (encoder.vit.blocks[0], 1 + depth), (encoder.vit.patch_embed, 2 + depth),
    ):  # fmt: skip
        expected = 1.0 if blocks_behind is None else 0.5 ** (blocks_behind + 1)
        assert {share[id(p)] for p in module.parameters()} == {expected}, module
    assert share[id(model.transformer.tokens)] == 0.5**3


def test_a_layer_decay_above_1_is_rejected():
    with pytest.raises(ValueError, match=r"layer_decay in \(0, 1\], but found 1.5"):
        OptimizerConfig(layer_decay=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr of at least 0, but found -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\), but found \(0.9, 1.0\)"),
        ({"weight_decay": -0.05}, "weight_decay of at least 0, but found -0.05"),
        ({"warmup": 3000.0}, "warmup, a fraction of all steps, in .*, but found 3000.0"),
        ({"final_lr": 10.0}, "final_lr, a fraction of lr, in .*, but found 10.0"),
    ],
)
def test_invalid_settings_of_the_optimizer_are_rejected(options, message):
    with pytest.raises(InputError, match=f"expected model.optimizer.{message}"):
        OptimizerConfig(**options)
