import math

import pytest
import torch

from lrm_pl.models.attention import Attention
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.models.transformer import ModLN
from lrm_pl.models.upsampler import Upsampler
from tests.builders import tiny_lrm


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_modln_at_identity_is_a_plain_layer_norm():
    layer = ModLN(6, 3)
    torch.nn.init.zeros_(layer.modulation[1].weight)
    torch.nn.init.zeros_(layer.modulation[1].bias)
    x = torch.randn(2, 5, 6)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(layer(x, torch.randn(2, 3)), expected, atol=1e-5)


def test_modln_shifts_and_scales_by_hand():
    layer = ModLN(2, 1)
    with torch.no_grad():
        layer.modulation[1].weight.zero_()
        layer.modulation[1].bias.copy_(torch.tensor([0.5, -1.0, 1.0, 2.0]))  # shift, then scale
    # LN of (1, 3) is (-1, 1): (-1) (1 + 1) + 0.5 and 1 (1 + 2) - 1.
    out = layer(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1))
    assert torch.allclose(out, torch.tensor([[[-1.5, 2.0]]]), atol=1e-4)


def test_modln_returns_the_same_result_with_and_without_gradients():
    torch.manual_seed(0)
    layer, x, camera = ModLN(6, 3), torch.randn(2, 5, 6), torch.randn(2, 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        plain = layer(x, camera)
    assert torch.allclose(layer(x, camera), plain, atol=1e-5)


def test_attention_equals_the_formula_written_out():
    torch.manual_seed(0)
    layer = Attention(8, heads=2, context_dim=6)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    q, (k, v) = layer.q(x), layer.kv(context).chunk(2, dim=-1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 2, dim=-1)
        heads.append(weights @ v[..., part])
    assert torch.allclose(layer(x, context), layer.out(torch.cat(heads, dim=-1)), atol=1e-5)


def test_the_upsampler_preserves_the_order_of_planes_rows_and_columns():
    layer = Upsampler(dim=1, channels=1, factor=2)
    torch.nn.init.ones_(layer.deconvolution.weight)
    torch.nn.init.zeros_(layer.deconvolution.bias)
    planes = layer(torch.arange(12.0).view(1, 12, 1))
    expected = torch.tensor([[0.0, 1], [2, 3]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(planes[0, :, 0], torch.stack([expected, expected + 4, expected + 8]))


def test_the_encoder_returns_class_and_patch_tokens_of_any_image_size():
    encoder = ImageEncoder("vit_small_patch14_dinov2", image_size=56)
    assert encoder(torch.rand(2, 3, 40, 40)).shape == (2, 1 + 4 * 4, 384)


def test_the_encoder_normalizes_images():
    encoder = ImageEncoder("vit_small_patch14_dinov2", image_size=28)
    seen = []
    encoder.vit.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, 384)
    encoder(torch.full((1, 3, 28, 28), 0.5))
    expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    assert torch.allclose(seen[0][0, :, 0, 0], torch.tensor(expected), atol=1e-6)


def test_an_image_size_that_is_not_a_multiple_of_the_patch_size_is_an_error():
    with pytest.raises(ValueError, match=r"multiple of 14, but found 30"):
        ImageEncoder("vit_small_patch14_dinov2", image_size=30)


def test_only_a_frozen_encoder_has_no_gradients():
    model = tiny_lrm()
    c2w, camera = torch.eye(4).expand(2, 1, 4, 4), torch.full((2, 1, 4), 0.5)
    torch.nn.init.normal_(model.transformer.blocks[0].self_norm.modulation[1].weight)
    model(torch.rand(2, 1, 3, 28, 28), c2w, camera).planes.square().sum().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith(("encoder.", "decoder.")) for name in missing)
    assert any(name.startswith("encoder.vit.blocks") for name in missing)
    assert all(p.grad is None for p in model.encoder.parameters())


def test_the_input_camera_changes_the_triplane_of_a_modulated_network():
    model = tiny_lrm()
    for block in model.transformer.blocks:
        torch.nn.init.normal_(block.cross_norm.modulation[1].weight)
    image, camera = torch.rand(1, 1, 3, 28, 28), torch.full((1, 1, 4), 0.5)
    near, far = torch.eye(4)[None, None].clone(), torch.eye(4)[None, None].clone()
    near[0, 0, 1, 3], far[0, 0, 1, 3] = -1.5, -3.0
    difference = model(image, near, camera).planes - model(image, far, camera).planes
    assert difference.abs().max() > 1e-5


def test_the_number_of_parameters_of_the_model_in_the_paper():
    with torch.device("meta"):
        model = LRM(ImageEncoder(), NeRFDecoder())
    D, E, M, F = 1024, 1024, 768, 80
    # ViT-B/16 at 512: patches 3 * 16 * 16 -> 768 with bias, class token, 1 + 32 * 32 positions, 12 blocks, last norm.
    vit_block = 2 * 2 * M + (M + 1) * 3 * M + (M + 1) * M + (M + 1) * 4 * M + (4 * M + 1) * M
    assert parameters(model.encoder) == (3 * 256 + 1) * M + M + 1025 * M + 12 * vit_block + 2 * M
    assert parameters(model.camera_embedder) == (20 + 1) * E + (E + 1) * E
    modln = 2 * D + (E + 1) * 2 * D
    cross, self_ = D * D + M * 2 * D + D * D, D * 3 * D + D * D
    mlp = (D + 1) * 4 * D + (4 * D + 1) * D
    tokens = 3 * 32 * 32 * D
    assert parameters(model.transformer) == tokens + 16 * (3 * modln + cross + self_ + mlp) + 2 * D
    assert parameters(model.upsampler) == D * F * 2 * 2 + F
    assert parameters(model.decoder) == (3 * F + 1) * 64 + 8 * (64 + 1) * 64 + (64 + 1) * 4
    assert parameters(model) == 452_018_836


def test_the_shape_of_the_planes_in_the_paper():
    with torch.device("meta"):
        model = LRM(ImageEncoder(), NeRFDecoder())
        triplane = model(torch.empty(1, 1, 3, 512, 512), torch.empty(1, 1, 4, 4), torch.empty(1, 1, 4))
    assert triplane.planes.shape == (1, 3, 80, 64, 64)


def planes_of(model, views=1, **changes):
    torch.manual_seed(1)
    inputs = {
        "image": torch.rand(2, views, 3, 28, 28),
        "c2w": torch.eye(4).expand(2, views, 4, 4).clone(),
        "fxfycxcy": torch.full((2, views, 4), 0.5),
    }
    return model(**{**inputs, **changes}).planes


def modulated(**options):
    """Return a small network with nonzero modulations."""
    model = tiny_lrm(**options)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_camera_vectors_of_20_16_and_0_elements():
    poses = torch.eye(4).expand(2, 1, 4, 4).clone()
    poses[:, :, 3] = torch.tensor([0.0, 0, 0, 7])
    moved = torch.eye(4).expand(2, 1, 4, 4).clone()
    moved[:, :, 1, 3] = -3
    for camera, sees_last_row, sees_pose in ((20, True, True), (16, False, True), (None, False, False)):
        model = modulated(camera=camera)
        plain = planes_of(model)
        assert torch.equal(plain, planes_of(model, c2w=poses)) is not sees_last_row
        assert torch.equal(plain, planes_of(model, c2w=moved)) is not sees_pose
    assert modulated(camera=16).camera_embedder.mlp[0].in_features == 16
    assert not any("modulation" in name for name, _ in modulated(camera=None).named_parameters())


@torch.no_grad()
def test_all_input_views_and_their_cameras_change_the_planes():
    model = modulated(input_views=3)
    plain = planes_of(model, 3)
    for view in range(3):
        for name in ("image", "c2w"):
            torch.manual_seed(1)
            value = (
                torch.rand(2, 3, 3, 28, 28) if name == "image" else torch.eye(4).expand(2, 3, 4, 4).clone()
            )
            value[:, view] += 0.5
            assert (planes_of(model, 3, **{name: value}) - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match="expected 1 input view, or several input views with camera"):
        tiny_lrm(input_views=2, camera=None)


@torch.no_grad()
def test_qk_norm_bounds_the_logits_for_large_weights():
    torch.manual_seed(0)
    x, plain, normed = torch.randn(1, 6, 16), Attention(16, 2), Attention(16, 2, qk_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)

    def answers(layer, factor):
        scaled = Attention(16, 2, qk_norm=layer is normed)
        scaled.load_state_dict(layer.state_dict())
        scaled.qkv.weight[:32] *= factor  # queries and keys
        return scaled(x)

    assert torch.allclose(answers(normed, 1), answers(normed, 100), atol=1e-4)
    assert not torch.allclose(answers(plain, 1), answers(plain, 100), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch16_224.dino", 1),
        ("vit_small_patch14_dinov2", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_small_patch16_dinov3", 5),
    ],
)
@torch.no_grad()
def test_number_of_tokens_by_encoder_and_image_size(name, prefix):
    patch = 14 if "14" in name else 16
    encoder = ImageEncoder(name, image_size=3 * patch, dim=48, depth=2, heads=3).eval()
    images = torch.rand(2, 3, 3 * patch, 3 * patch)
    everything = encoder(images)
    assert everything.shape == (2, prefix + 9, 48)
    few = ImageEncoder(
        name, image_size=3 * patch, dim=48, depth=2, heads=3, tokens="class_and_patches"
    ).eval()
    few.load_state_dict(encoder.state_dict())
    assert torch.equal(few(images), torch.cat([everything[:, :1], everything[:, prefix:]], dim=1))


def test_the_error_for_an_unknown_encoder_lists_similar_names():
    with pytest.raises(
        ValueError, match=r"found 'vit_smal_patch14_dinov2'. Use one of vit_small_patch14_dinov2"
    ):
        ImageEncoder("vit_smal_patch14_dinov2")


def test_normalization_of_images_can_be_disabled():
    encoder = ImageEncoder(
        "vit_small_patch14_dinov2", image_size=28, normalize=False, dim=48, depth=1, heads=3
    )
    seen = []
    encoder.vit.forward_features = lambda x: seen.append(x) or torch.zeros(1, 5, 48)
    encoder(torch.full((1, 3, 28, 28), 0.3))
    assert torch.equal(seen[0], torch.full((1, 3, 28, 28), 0.3))


def test_options_of_the_decoder():
    def decoded(**options):
        decoder = NeRFDecoder(channels=1, width=1, layers=2, fold=False, **options)
        weights = (torch.ones(1, 3), torch.zeros(1), torch.tensor([[1.0], [0], [50], [-50]]), torch.zeros(4))
        raw, color = decoder.decode(torch.tensor([[-2.0, 0.5, 0.5]]), weights)
        return raw.item(), decoder.density(raw).item(), color[0].tolist()

    # The features add up to -1: ReLU gives 0, SiLU gives -1 / (1 + e).
    raw, sigma, color = decoded()
    assert raw == 0
    assert sigma == pytest.approx(math.log1p(math.exp(-1)))
    assert color == pytest.approx([0.5, 0.5, 0.5])
    raw, sigma, color = decoded(
        activation="silu", density_activation="exp", density_bias=2.0, color_margin=0.0
    )
    silu = -1 / (1 + math.e)
    assert raw == pytest.approx(silu)
    assert sigma == pytest.approx(math.exp(silu + 2))
    assert color == pytest.approx([0.5, 1 / (1 + math.exp(-50 * silu)), 1 / (1 + math.exp(50 * silu))])
    wide = decoded(activation="silu", color_margin=0.1)[2]
    assert wide[2] == pytest.approx(color[2] * 1.2 - 0.1)
    assert wide[2] > 1 > color[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet50"}, "resnet50: expected a vision transformer"),
        (
            {"name": "swin_tiny_patch4_window7_224", "image_size": 224},
            "expected a vision transformer, but found Swin",
        ),
        (
            {"name": "vit_small_patch14_dinov2", "image_size": 28, "dim": 50, "heads": 3},
            "with consistent sizes",
        ),
    ],
)
def test_unsupported_encoders_and_inconsistent_sizes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**options)


def test_indivisible_widths_are_errors():
    with pytest.raises(ValueError, match="a width divisible by the number of heads, 0, but found 16"):
        tiny_lrm(heads=0)
    with pytest.raises(ValueError, match="a width divisible by 32"):
        tiny_lrm(blocks="triposr")
