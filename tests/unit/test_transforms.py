import numpy as np
import pytest
import torch

from lrm_pl.data.batch import collate
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.schema import Sample, SampleError, SampleInfo, encode_image
from lrm_pl.data.stream import BatchPartition, EvaluationSet, TrainingStream
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.data.transforms import (
    Augmentation,
    CropConfig,
    CropStage,
    choose_views,
    decode_views,
    evaluation_item,
    sample_rng,
    training_item,
)
from lrm_pl.geometry.rays import pixel_rays
from lrm_pl.kernels.views import resize


def mixture(folder):
    return Mixture([DataSet(str(folder))])


WHOLE = Augmentation(CropConfig(32, 32, 32))


def training_of(sample, views, crop, rng, inputs=1, step=0, **options):
    return training_item(decode_views(sample, views, step, rng), inputs, Augmentation(crop, **options))


def position_coded_sample(side=64):
    """A square that faces the camera, with the coordinate u in red and v in green."""
    centers = (np.arange(side) + 0.5) / side
    red, green = np.meshgrid(centers, centers)
    rgba = np.stack([red, green, np.zeros_like(red), np.ones_like(red)], -1)
    view = encode_image(np.round(rgba * 255).astype(np.uint8))
    pose = np.array([[1, 0, 0, 0], [0, 0, 1, -2], [0, -1, 0, 0], [0, 0, 0, 1]], np.float32)
    info = SampleInfo("coded", "coded", "CC0", "x", "x", 0, "x", 2)
    camera = np.array([1.0, 1.0, 0.5, 0.5], np.float32)
    return Sample(info, np.stack([pose, pose]), np.stack([camera, camera]), (view, view))


def test_resized_and_cropped_intrinsics_are_exact_to_a_fraction_of_a_pixel():
    sample = position_coded_sample()
    for seed in range(5):
        item = training_of(sample, [0, 1], CropConfig(24, 64, 20), np.random.default_rng(seed))
        views = item.target
        _, directions = pixel_rays(views.c2w, views.fxfycxcy, 20, 20)
        # In the canonical frame a ray of pixel (u, v) is (u - 0.5, 1, 0.5 - v) up to length.
        u = directions[..., 0] / directions[..., 1] + 0.5
        v = 0.5 - directions[..., 2] / directions[..., 1]
        inside = slice(2, -2)  # antialiasing rounds the border of the whole image
        assert torch.allclose(views.images[:, 0, inside, inside], u[:, inside, inside], atol=0.01)
        assert torch.allclose(views.images[:, 1, inside, inside], v[:, inside, inside], atol=0.01)


def test_resizing_keeps_pixel_centers():
    image = torch.tensor([[[0.0, 0.2, 0.4, 0.6]]]).expand(1, 4, 4)
    assert torch.allclose(resize(image, 4), image)
    # Antialiased halving: triangle filter of width 4 about 1.5 and 3.5 pixels; the ramp is linear inside.
    halved = resize(torch.linspace(0, 1, 16).expand(1, 16, 16), 8)[0, 0]
    assert torch.allclose(halved[1:-1], (torch.arange(1, 7) * 2 + 0.5) / 15, atol=1e-5)


def test_the_background_is_visible_only_outside_the_object():
    sample = synthetic_sample("a", views=4, resolution=32, seed=0)
    item = training_of(sample, [0, 1, 2], CropConfig(32, 32, 32), np.random.default_rng(0))
    target, background = item.target, item.target.background[:, :, None, None]
    empty = (target.alpha == 0)[:, None].expand_as(target.images)
    assert torch.equal(target.images[empty], background.expand_as(target.images)[empty])
    assert len({tuple(color.tolist()) for color in target.background}) == 3
    white = evaluation_item(sample, 1, [0]).input.over_white().images
    assert torch.equal(item.input.over_white().images, white), "the input view is over white"


def test_the_randomness_of_a_sample_depends_only_on_seed_epoch_and_key():
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)

    def item(seed, epoch, key):
        rng = sample_rng(seed, epoch, key)
        return training_of(sample, choose_views(rng, 8, 4), CropConfig(16, 32, 16), rng).target

    same = item(0, 1, "a")
    assert torch.equal(same.images, item(0, 1, "a").images)
    for other in (item(1, 1, "a"), item(0, 2, "a"), item(0, 1, "b")):
        assert not torch.equal(same.images, other.images)


def test_the_input_view_is_also_a_target_and_has_the_canonical_pose():
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)
    item = training_of(sample, [5, 2, 3], CropConfig(32, 32, 32), np.random.default_rng(0))
    assert torch.equal(item.input.c2w[0], item.target.c2w[0])
    assert torch.allclose(item.input.c2w[0, :3, 3], torch.tensor([0.0, -2.6, 0.0]), atol=1e-5)


def test_unseen_views_are_used_only_in_validation(shards):
    stream = TrainingStream(mixture(shards), BatchPartition(2), 1, 3, 3, None, WHOLE, 0, 4, 40)
    used = {view for g in range(80) for view in stream.read((stream.order.locate(g), 0))["__views__"]}
    assert used == {0, 1, 2, 3, 4}
    items = EvaluationSet(mixture(shards), "train", 1, slice(-3, None))
    assert len(items) == len(list(items)) == 4
    assert next(iter(items)).target.rgba.shape == (3, 32, 32, 4)


def test_a_limited_evaluation_set_is_evenly_distributed_over_the_split(shards):
    everything = [item.ids for item in EvaluationSet(mixture(shards), "train", 1, slice(7, 8))]
    for limit, expected in ((2, everything[::2]), (9, everything), (None, everything)):
        limited = EvaluationSet(mixture(shards), "train", 1, slice(7, 8), limit)
        assert [item.ids for item in limited] == expected
        assert len(limited) == len(expected)


def test_the_order_does_not_depend_on_the_number_of_workers(shards, monkeypatch):
    def ids(worker, workers, position=0, batches=12):
        class Info:
            id, num_workers = worker, workers

        monkeypatch.setattr("lrm_pl.data.stream.get_worker_info", lambda: Info if workers else None)
        stream = TrainingStream(
            mixture(shards),
            BatchPartition(2),
            1,
            2,
            2,
            None,
            Augmentation(CropConfig(8, 32, 8)),
            0,
            4,
            batches,
            0,
            position,
        )
        return [batch.ids for batch in stream]

    alone = ids(0, 0)
    assert len(alone) == 12
    shared = [None] * 12
    for k in range(3):
        shared[k::3] = ids(k, 3)
    assert shared == alone
    assert ids(0, 0, position=14, batches=5) == alone[7:], "a resumed stream goes on where it was"


def test_collate_rejects_items_of_different_sizes():
    small, large = (evaluation_item(synthetic_sample("a", 2, side, 0), 1, [1]) for side in (16, 32))
    with pytest.raises(ValueError, match=r"equal shape in a batch, but found .*16, 16.*32, 32"):
        collate([small, large])


def test_choose_views_rejects_objects_with_too_few_views():
    with pytest.raises(SampleError, match="at least 4 training views, but found 3"):
        choose_views(np.random.default_rng(0), 3, 4)


def test_the_input_pool_limits_input_views_but_not_target_views():
    drawn = [choose_views(np.random.default_rng(seed), 12, 4, input_pool=2) for seed in range(200)]
    assert {views[0] for views in drawn} == {0, 1}
    assert {view for views in drawn for view in views[1:]} == set(range(12))
    assert all(len(set(views)) == 4 for views in drawn)


def test_foreground_windows_contain_the_object():
    sample = synthetic_sample("a", views=4, resolution=96, seed=0)

    def covered(foreground):
        crop = CropConfig(96, 96, 8, foreground)
        items = [training_of(sample, [0, 1], crop, np.random.default_rng(seed)) for seed in range(40)]
        return torch.stack([item.target.alpha.amax((-1, -2)) > 0.5 for item in items]).float().mean().item()

    assert covered(1.0) == 1.0
    assert covered(0.0) < 0.8 < covered(0.8) < 1.0


def test_crop_stages_begin_at_the_configured_step_after_any_resume(shards):
    stages = (CropStage(3, CropConfig(16, 24, 16)), CropStage(5, CropConfig(32, 32, 32)))
    augmentation = Augmentation(CropConfig(8, 8, 8), stages)

    def sizes(steps, step, position):
        stream = TrainingStream(
            mixture(shards),
            BatchPartition(2),
            1,
            2,
            2,
            None,
            augmentation,
            0,
            4,
            steps,
            step,
            position,
        )
        return [batch.to("cpu").target.size[0] for batch in stream]

    assert sizes(7, 0, 0) == [8, 8, 8, 16, 16, 32, 32]
    assert sizes(4, 3, 12) == [16, 16, 32, 32], "the position has seen batches of another size"
    with pytest.raises(ValueError, match=r"ascending steps of at least 1, but found \[5, 3\]"):
        Augmentation(CropConfig(8, 8, 8), stages[::-1])


def test_camera_noise_changes_only_the_input_cameras():
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)

    def item(noise):
        return training_of(
            sample, [5, 2, 3], CropConfig(32, 32, 32), np.random.default_rng(1), camera_noise=noise
        )

    exact, noisy = item(0.0), item(0.02)
    assert torch.equal(noisy.target.c2w, exact.target.c2w)
    assert torch.equal(noisy.target.fxfycxcy, exact.target.fxfycxcy)
    assert torch.equal(noisy.target.images, exact.target.images)
    pose, camera = (
        (noisy.input.c2w - exact.input.c2w).abs(),
        (noisy.input.fxfycxcy - exact.input.fxfycxcy).abs(),
    )
    assert torch.equal(pose[:, 3], torch.zeros(1, 4))
    assert 0 < pose[:, :3].max() <= 0.02
    assert 0 < camera.max() <= 0.02


def test_all_input_views_are_full_size_inputs_and_cropped_targets():
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)
    item = training_of(sample, [5, 2, 3, 1], CropConfig(16, 32, 16), np.random.default_rng(0), inputs=2)
    assert item.input.rgba.shape == (2, 32, 32, 4)
    assert item.target.images.shape == (4, 3, 16, 16)
    assert torch.equal(item.input.c2w, item.target.c2w[:2])
    evaluated = evaluation_item(sample, 2, [6, 7])
    assert torch.allclose(evaluated.input.c2w[0], item.input.c2w[0], atol=1e-6), "both canonical by the first"
    assert evaluated.input.rgba.shape == evaluated.target.rgba.shape == (2, 32, 32, 4)
