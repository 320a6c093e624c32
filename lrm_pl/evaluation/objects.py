"""Reconstruction of one object from input views, and metrics of images and surfaces."""

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrm_pl.data.schema import SURFACE_MEMBER, Sample, SampleError, decode_image
from lrm_pl.data.surface import decode_surface
from lrm_pl.data.transforms import sample_rng
from lrm_pl.evaluation.protocols import Protocol, SurfaceSettings, f_score_name
from lrm_pl.evaluation.surfaces import PointCloud, SurfaceScores, align, compare_surfaces
from lrm_pl.geometry.cameras import canonical_rotation, canonicalize
from lrm_pl.inference.scene import Scene, to_tensor
from lrm_pl.kernels.device import without_tf32
from lrm_pl.kernels.views import over_white
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.meshing.surface import NoSurfaceError
from lrm_pl.meshing.triangles import sample_surface
from lrm_pl.metrics import NotFiniteError, psnr, ssim
from lrm_pl.progress import stage

#: Function from images (n, 3, h, w) in [0, 1] to embeddings (n, d).
Embed = Callable[[Tensor], Tensor]

#: Function from an RGBA input view (4, h, w), a canonical pose and normalized intrinsics to a reconstructed scene.
Reconstruct = Callable[[Tensor, Tensor, Tensor], Scene]

#: Number of target views in the image strip.
_SHOWN = 4

#: Batch size of the image metrics.
_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class PerceptualMetrics:
    """Networks of the perceptual metrics.

    Attributes:
        lpips: LPIPS networks by name.
        clip: CLIP image encoder. If None, CLIP similarity is not computed.
        features: Feature extractor for FID and KID. If None, FID and KID are not computed.
    """

    lpips: Mapping[str, PerceptualLoss]
    clip: Embed | None = None
    features: Embed | None = None


@dataclasses.dataclass(frozen=True)
class ObjectResult:
    """Metrics and images of one object.

    Attributes:
        rows: Metrics of the model (key "model") and of each baseline, averaged over the images of the object.
        strip: Image strip of shape (3, H, W) with the input, and the target and rendering of each shown view.
        features: Image features of the targets (key "target"), the model and each baseline. Empty if FID and KID are
            not computed.
        notes: Reasons for missing metrics.
    """

    rows: dict[str, dict[str, float]]
    strip: Float[Tensor, "3 H W"]
    features: dict[str, Float[np.ndarray, "n d"]]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, bytes]:
        """File contents of the image strip and the features by file name suffix."""
        pixels = (self.strip.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        return {".png": file.getvalue()} | (features_file(self.features) if self.features else {})


def features_file(features: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Encode features for ``records.read_features``, and return the file content by file name suffix."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {name.replace(" ", "_"): values for name, values in features.items()}
    np.savez(file, **arrays)
    return {".npz": file.getvalue()}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Trivial prediction with which the model is compared.

    Attributes:
        predict: Function from an input image (3, h, w) and targets (n, 3, h, w) to predictions of the same shape as the
            targets.
        uses_input: Whether the prediction depends on the input image.
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    uses_input: bool


@torch.no_grad()
def measure_object(
    sample: Sample,
    protocol: Protocol,
    reconstruct: Reconstruct,
    perceptual: PerceptualMetrics,
    baselines: Mapping[str, Baseline],
) -> ObjectResult:
    """Reconstruct an object, and compute metrics in float32 without TF32 on the device of the model.

    Args:
        sample: Sample with the views that the protocol requires.
        protocol: Evaluation protocol.
        reconstruct: Function that reconstructs a scene with the model.
        perceptual: Networks of the perceptual metrics.
        baselines: Baselines by name, which are used only if the protocol compares images.

    Raises:
        SampleError: A view cannot be decoded, or the sample has no surface points and the protocol requires them.
        NotFiniteError: A rendered image contains NaN or infinity.
    """
    targets = decode_over_white(sample, protocol.rendered)
    size = targets.shape[-2], targets.shape[-1]
    predictions: dict[str, list[Tensor]] = {"model": []}
    surface: dict[str, list[float]] = {}
    notes = list[str]()
    strip: Tensor | None = None
    for view in protocol.inputs:
        image = decode_over_white(sample, (view,))[0]
        rgba = input_view(sample, view)
        c2w = canonicalize(torch.from_numpy(sample.c2w[[view, *protocol.rendered]]))
        fxfycxcy = torch.from_numpy(sample.fxfycxcy[[view, *protocol.rendered]])
        scene = reconstruct(rgba, c2w[0], fxfycxcy[0])
        with stage("views"):
            renders = _render(scene, c2w[1:], fxfycxcy[1:], size)
        if not torch.isfinite(renders).all():
            raise NotFiniteError(
                subject=f"sample {sample.info.id!r}",
                expected="finite rendered images",
                found="NaN or infinity",
                remedy="the training has diverged. Use an earlier checkpoint",
            )
        image, targets = image.to(renders.device), targets.to(renders.device)
        predictions["model"].append(renders)
        _add_baselines(predictions, baselines, image, targets)
        strip = _strip(image, targets, renders) if strip is None else strip
        if protocol.surface is not None:
            with stage("surface"):
                note = _measure_surface(surface, scene, sample, view, protocol.surface)
            notes += [note] if note else []
    assert strip is not None, protocol.inputs
    rows: dict[str, dict[str, float]] = {
        "model": {name: float(np.mean(values)) for name, values in surface.items()}
    }
    features = dict[str, Float[np.ndarray, "n d"]]()
    if protocol.targets:
        with stage("metrics"), without_tf32():
            for name, row in _measure_images(predictions, targets, perceptual).items():
                rows[name] = rows.get(name, {}) | row
            features = _features(predictions | {"target": [targets]}, perceptual)
    return ObjectResult(rows, strip.cpu(), features, tuple(notes))


@torch.no_grad()
def measure_baselines(
    sample: Sample,
    protocol: Protocol,
    perceptual: PerceptualMetrics,
    baselines: Mapping[str, Baseline],
    device: torch.device,
) -> tuple[dict[str, dict[str, float]], dict[str, Float[np.ndarray, "n d"]]]:
    """Compute the metrics of baselines for an object whose model metrics already exist.

    Args:
        sample: Sample with the views that the protocol requires.
        protocol: Evaluation protocol with target views.
        perceptual: Networks of the perceptual metrics.
        baselines: Baselines by name.
        device: Device on which metrics are computed.

    Returns:
        Metrics and features of the baselines.

    Raises:
        SampleError: A view cannot be decoded.
    """
    targets = decode_over_white(sample, protocol.rendered).to(device)
    predictions = dict[str, list[Tensor]]()
    for view in protocol.inputs:
        _add_baselines(predictions, baselines, decode_over_white(sample, (view,))[0].to(device), targets)
    with stage("metrics"), without_tf32():
        return _measure_images(predictions, targets, perceptual), _features(predictions, perceptual)


def _add_baselines(
    predictions: dict[str, list[Tensor]], baselines: Mapping[str, Baseline], image: Tensor, targets: Tensor
) -> None:
    """Append the predictions of the baselines for one input image.

    Predictions that do not depend on the input image are computed only once.
    """
    for name, baseline in baselines.items():
        if baseline.uses_input or name not in predictions:
            predictions.setdefault(name, []).append(baseline.predict(image, targets))


def _features(
    images: Mapping[str, list[Tensor]], perceptual: PerceptualMetrics
) -> dict[str, Float[np.ndarray, "n d"]]:
    """Return the features for FID and KID of the images in each row."""
    if perceptual.features is None:
        return {}
    return {name: perceptual.features(torch.cat(each)).float().cpu().numpy() for name, each in images.items()}


def true_surface(sample: Sample, view: int, settings: SurfaceSettings) -> PointCloud:
    """Return the surface points of a sample in the canonical frame of the input view.

    Raises:
        SampleError: The sample has no surface points.
    """
    if SURFACE_MEMBER not in sample.extras:
        raise SampleError(
            subject=f"sample {sample.info.id!r}",
            expected=f"surface points ({SURFACE_MEMBER})",
            found="none",
            remedy='render the shards with ARGS="--surface"',
        )
    points, normals = decode_surface(sample.info.id, sample.extras[SURFACE_MEMBER])
    turn = canonical_rotation(torch.from_numpy(sample.c2w[view])).double().numpy()
    truth = PointCloud(
        points[: settings.points].astype(np.float64), normals[: settings.points].astype(np.float64)
    )
    truth = truth.transformed(turn)
    return truth.normalized() if settings.normalized else truth


def _measure_surface(
    row: dict[str, list[float]], scene: Scene, sample: Sample, view: int, settings: SurfaceSettings
) -> str:
    """Append the surface metrics of a reconstruction to ``row``.

    Returns:
        Reason why the reconstruction has no surface, or "" if it has a surface.
    """
    truth = true_surface(sample, view, settings)
    try:
        mesh = scene.mesh(resolution=settings.resolution)
    except NoSurfaceError as error:
        for threshold in settings.thresholds:  # if there are no points, distances are undefined
            row.setdefault(f_score_name(threshold), []).append(0.0)
        return f"view {view}: {error}"
    rng = sample_rng(0, view, sample.info.id)
    prediction = PointCloud(
        *sample_surface([(mesh.vertices.astype(np.float64), mesh.faces)], settings.points, rng)
    )
    if settings.normalized:
        prediction = prediction.normalized()
    if settings.aligned:
        prediction = align(prediction, truth)
    add_surface(row, compare_surfaces(prediction, truth, settings.thresholds))
    return ""


def add_surface(row: dict[str, list[float]], scores: SurfaceScores) -> None:
    """Append the scores of a surface to ``row``, with the names that ``surface_metrics`` defines."""
    values = {"chamfer": scores.chamfer, "normal_consistency": scores.normal_consistency}
    values |= {f_score_name(threshold): value for threshold, value in scores.f_scores.items()}
    for name, value in values.items():
        row.setdefault(name, []).append(value)


def input_view(sample: Sample, view: int) -> Float[Tensor, "4 h w"]:
    """Decode an input view as RGBA with straight alpha.

    Raises:
        SampleError: The view cannot be decoded or is fully transparent.
    """
    rgba = to_tensor(decode_image(sample.info.id, sample.views[view]))
    if not rgba[3].any():
        raise SampleError(
            subject=f"sample {sample.info.id!r}",
            expected=f"an object in view {view}",
            found="alpha 0 everywhere",
        )
    return rgba


def decode_over_white(sample: Sample, views: tuple[int, ...]) -> Float[Tensor, "n 3 h w"]:
    """Decode views and composite them over white.

    Raises:
        SampleError: A view cannot be decoded, or the views have different sizes.
    """
    rgba = [decode_image(sample.info.id, sample.views[view]) for view in views]
    if len({image.shape for image in rgba}) > 1:
        raise SampleError(subject=f"sample {sample.info.id!r}", expected="views of one size", found="several")
    images, _ = over_white(torch.from_numpy(np.stack(rgba)))
    return images


def _render(scene: Scene, c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
    device = scene.field.planes.device
    occupancy = scene.occupancy
    views = []
    for pose, camera in zip(c2w.to(device), fxfycxcy.to(device), strict=True):
        with torch.autocast(device.type, torch.bfloat16):
            pixels = scene.renderer.draw(
                scene.field, [occupancy], pose[None, None], camera[None, None], (size[0], size[1])
            )
        views.append(pixels.over(torch.ones(3, device=device))[0, 0].clamp(0, 1).permute(2, 0, 1))
    return torch.stack(views)


def _measure_images(
    predictions: Mapping[str, list[Tensor]], targets: Tensor, perceptual: PerceptualMetrics
) -> dict[str, dict[str, float]]:
    """Compute the image metrics of all predictions."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in predictions}
    for start in range(0, len(targets), _IMAGES):
        target = targets[start : start + _IMAGES]
        target_features = {name: _features_of(network, target) for name, network in perceptual.lpips.items()}
        clip = None if perceptual.clip is None else perceptual.clip(target)
        for name, row in values.items():
            for images in predictions[name]:
                prediction = images[start : start + _IMAGES]
                # A baseline may be a single image that is expanded to the number of targets.
                is_repeated = prediction.stride(0) == 0
                distinct = prediction[:1] if is_repeated else prediction
                found = {"psnr": psnr(prediction, target), "ssim": ssim(prediction, target)}
                for network_name, network in perceptual.lpips.items():
                    distance = network.distance(
                        _features_of(network, distinct), target_features[network_name]
                    )
                    found[f"lpips_{network_name}"] = distance
                if perceptual.clip is not None and clip is not None:
                    found["clip"] = torch.nn.functional.cosine_similarity(
                        perceptual.clip(distinct), clip, dim=-1
                    )
                figures = torch.stack([figure.to(prediction.device) for figure in found.values()]).cpu()
                # The repeated input view equals one target exactly, which has an infinite PSNR and is excluded.
                is_finite = figures[0].isfinite()
                for metric, figure in zip(found, figures, strict=True):
                    row.setdefault(metric, []).extend(figure[is_finite].tolist())
    return {
        name: {metric: float(np.mean(v)) for metric, v in row.items() if v} for name, row in values.items()
    }


def _features_of(network: PerceptualLoss, images: Tensor) -> tuple[Tensor, ...]:
    return network.features(images.to(next(network.network.parameters()).device))


def _strip(image: Tensor, targets: Tensor, renders: Tensor) -> Float[Tensor, "3 H W"]:
    height = targets.shape[-2]
    if image.shape[-2] != height:
        image = torch.nn.functional.interpolate(
            image[None], (height, height), mode="bilinear", antialias=True
        )[0]
    count = min(_SHOWN, len(targets))
    chosen = [(2 * k + 1) * len(targets) // (2 * count) for k in range(count)]
    cells = [image]
    for k in chosen:
        cells += [targets[k], renders[k]]
    return torch.cat(cells, dim=-1)
