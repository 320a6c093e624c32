"""Reconstruction of one object from input views, and metrics of images and surfaces."""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.data.schema import SURFACE_MEMBER, Sample, SampleError, decode_image
from lrm_pl.data.surface import decode_surface
from lrm_pl.data.transforms import sample_rng
from lrm_pl.evaluation.protocols import Protocol, SurfaceSettings, f_score_name
from lrm_pl.evaluation.records import ObjectRecord
from lrm_pl.evaluation.surfaces import PointCloud, align, compare_surfaces
from lrm_pl.geometry.cameras import PosedCamera, canonical_rotation, canonicalize
from lrm_pl.images import encode_png
from lrm_pl.inference.scene import Scene, to_tensor, to_uint8
from lrm_pl.kernels.device import without_tf32
from lrm_pl.kernels.views import over_white
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.meshing.surface import NoSurfaceError
from lrm_pl.meshing.triangles import sample_surface
from lrm_pl.metrics import NotFiniteError, psnr, ssim
from lrm_pl.progress import stage

#: Function from images (n, 3, h, w) in [0, 1] to embeddings (n, d).
Embed = Callable[[Tensor], Tensor]

#: Function from an RGBA input view of shape (4, h, w) and its camera to a reconstructed scene, such as a pipeline.
Reconstruct = Callable[[Tensor, PosedCamera], Scene]

#: Baselines by name. The prediction is an image of shape (3, h, w), or the input view if the value is None.
Baselines = Mapping[str, Tensor | None]

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


@torch.no_grad()
def measure_object(
    sample: Sample,
    protocol: Protocol,
    reconstruct: Reconstruct,
    perceptual: PerceptualMetrics,
    baselines: Baselines,
) -> tuple[ObjectRecord, dict[str, bytes]]:
    """Reconstruct an object, and compute metrics in float32 without TF32 on the device of the model.

    Args:
        sample: Sample with the views that the protocol requires.
        protocol: Evaluation protocol.
        reconstruct: Function that reconstructs a scene with the model.
        perceptual: Networks of the perceptual metrics.
        baselines: Baselines, which are used only if the protocol compares images.

    Returns:
        Record of the object, with metrics averaged over images, and file contents by file name suffix: an image strip
        with the input, and the target and rendering of each shown view (.png), and image features for FID and KID
        (.npz).

    Raises:
        SampleError: A view cannot be decoded, or the sample has no surface points and the protocol requires them.
        NotFiniteError: A rendered image contains NaN or infinity.
    """
    targets = decode_over_white(sample, protocol.rendered)
    size = targets.shape[-2], targets.shape[-1]
    predictions: dict[str, list[Tensor]] = {"model": []}
    surface = defaultdict[str, list[float]](list)
    notes, files = list[str](), dict[str, bytes]()
    for view in protocol.inputs:
        image = decode_over_white(sample, (view,))[0]
        c2w = canonicalize(torch.from_numpy(sample.c2w[[view, *protocol.rendered]]))
        scene = reconstruct_sample(reconstruct, sample, view)
        with stage("views"):
            renders = _render(scene, c2w[1:], torch.from_numpy(sample.fxfycxcy[[*protocol.rendered]]), size)
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
        if not files:
            files[".png"] = encode_png(_strip(image, targets, renders))
        if protocol.surface is not None:
            try:
                with stage("surface"):
                    metrics = _measure_surface(scene, sample, view, protocol.surface)
            except NoSurfaceError as error:  # the distances are undefined
                metrics = {f_score_name(threshold): 0.0 for threshold in protocol.surface.thresholds}
                notes.append(f"view {view}: {error}")
            for name, value in metrics.items():
                surface[name].append(value)
    rows = {"model": {name: float(np.mean(values)) for name, values in surface.items()}}
    if protocol.targets:
        image_rows, features = _measure_images(predictions, targets, perceptual)
        rows = image_rows | {"model": rows["model"] | image_rows["model"]}
        files |= features_file(features)
    return ObjectRecord(sample.info.id, rows, tuple(notes), files=tuple(files)), files


@torch.no_grad()
def measure_baselines(
    sample: Sample,
    protocol: Protocol,
    perceptual: PerceptualMetrics,
    baselines: Baselines,
    device: torch.device,
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Compute the metrics of baselines for an object whose model metrics already exist.

    Args:
        sample: Sample with the views that the protocol requires.
        protocol: Evaluation protocol with target views.
        perceptual: Networks of the perceptual metrics.
        baselines: Baselines by name.
        device: Device on which metrics are computed.

    Returns:
        Metrics of the baselines, and the features of the targets (key "target") and of the baselines.

    Raises:
        SampleError: A view cannot be decoded.
    """
    targets = decode_over_white(sample, protocol.rendered).to(device)
    predictions = dict[str, list[Tensor]]()
    for view in protocol.inputs:
        _add_baselines(predictions, baselines, decode_over_white(sample, (view,))[0].to(device), targets)
    return _measure_images(predictions, targets, perceptual)


def features_file(features: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Encode features for ``records.read_features``, and return the file content by file name suffix.

    If there are no features, no file is returned.
    """
    if not features:
        return {}
    file = io.BytesIO()
    arrays: dict[str, Any] = {name.replace(" ", "_"): values for name, values in features.items()}
    np.savez(file, **arrays)
    return {".npz": file.getvalue()}


def _add_baselines(
    predictions: dict[str, list[Tensor]], baselines: Baselines, image: Tensor, targets: Tensor
) -> None:
    """Append the predictions of the baselines for one input image.

    Predictions that do not depend on the input image are added only once.
    """
    for name, constant in baselines.items():
        if constant is None or name not in predictions:
            prediction = (image if constant is None else constant).to(targets)
            predictions.setdefault(name, []).append(resize_images(prediction, targets).expand_as(targets))


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


def _measure_surface(scene: Scene, sample: Sample, view: int, settings: SurfaceSettings) -> dict[str, float]:
    """Compute the surface metrics of a reconstruction.

    Raises:
        NoSurfaceError: The reconstruction has no surface.
    """
    truth = true_surface(sample, view, settings)
    mesh = scene.mesh(resolution=settings.resolution)
    rng = sample_rng(0, view, sample.info.id)
    triangles = mesh.vertices.astype(np.float64), mesh.faces
    prediction = PointCloud(*sample_surface([triangles], settings.points, rng))
    if settings.normalized:
        prediction = prediction.normalized()
    if settings.aligned:
        prediction = align(prediction, truth)
    return compare_surfaces(prediction, truth, settings.thresholds)


def reconstruct_sample(reconstruct: Reconstruct, sample: Sample, view: int) -> Scene:
    """Reconstruct an object from one view with the known camera.

    Raises:
        SampleError: The view cannot be decoded or is fully transparent.
    """
    rgba = to_tensor(decode_image(sample.info.id, sample.views[view]))
    if not rgba[3].any():
        raise SampleError(
            subject=f"sample {sample.info.id!r}",
            expected=f"an object in view {view}",
            found="only transparent pixels",
        )
    c2w = canonicalize(torch.from_numpy(sample.c2w[[view]]))[0]
    return reconstruct(rgba, PosedCamera(c2w, torch.from_numpy(sample.fxfycxcy[view])))


def decode_over_white(sample: Sample, views: tuple[int, ...]) -> Float[Tensor, "n 3 h w"]:
    """Decode views and composite them over white.

    Raises:
        SampleError: A view cannot be decoded, or the views have different sizes.
    """
    rgba = [decode_image(sample.info.id, sample.views[view]) for view in views]
    if len({image.shape for image in rgba}) > 1:
        raise SampleError(
            subject=f"sample {sample.info.id!r}", expected="views of the same size", found="different sizes"
        )
    images, _ = over_white(torch.from_numpy(np.stack(rgba)))
    return images


def resize_images(
    images: Float[Tensor, "*n 3 h w"], like: Float[Tensor, "*m 3 H W"]
) -> Float[Tensor, "*n 3 H W"]:
    """Resize images to the size of ``like`` by antialiased bilinear interpolation."""
    size = like.shape[-2:]
    if images.shape[-2:] == size:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), size, mode="bilinear", antialias=True)
    return flat.view(*images.shape[:-2], *size)


def _render(scene: Scene, c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
    device = scene.field.planes.device
    cameras = zip(c2w.to(device), fxfycxcy.to(device), strict=True)
    return torch.stack([scene.render(pose, size, camera).permute(2, 0, 1) for pose, camera in cameras])


def _measure_images(
    predictions: Mapping[str, list[Tensor]], targets: Tensor, perceptual: PerceptualMetrics
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Compute the image metrics of all predictions, and the features of the targets and of all predictions."""
    values = {name: defaultdict[str, list[float]](list) for name in predictions}
    features = dict[str, np.ndarray]()
    with stage("metrics"), without_tf32():
        for start in range(0, len(targets), _IMAGES):
            target = targets[start : start + _IMAGES]
            target_features = {name: network.features(target) for name, network in perceptual.lpips.items()}
            clip = None if perceptual.clip is None else perceptual.clip(target)
            for name, row in values.items():
                for images in predictions[name]:
                    prediction = images[start : start + _IMAGES]
                    # A baseline may be a single image that is expanded to the number of targets.
                    distinct = prediction[:1] if prediction.stride(0) == 0 else prediction
                    found = {"psnr": psnr(prediction, target), "ssim": ssim(prediction, target)}
                    for key, network in perceptual.lpips.items():
                        distance = network.distance(network.features(distinct), target_features[key])
                        found[f"lpips_{key}"] = distance
                    if perceptual.clip is not None and clip is not None:
                        found["clip"] = F.cosine_similarity(perceptual.clip(distinct), clip, dim=-1)
                    stacked = torch.stack(list(found.values())).cpu()
                    # The repeated input view equals one target, where the PSNR is infinite. This target is excluded.
                    finite = stacked[:, stacked[0].isfinite()].tolist()
                    for metric, figures in zip(found, finite, strict=True):
                        row[metric] += figures
        if perceptual.features is not None:
            for name, each in {**predictions, "target": [targets]}.items():
                features[name] = perceptual.features(torch.cat(each)).float().cpu().numpy()
    rows = {
        name: {metric: float(np.mean(v)) for metric, v in row.items() if v} for name, row in values.items()
    }
    return rows, features


def _strip(image: Tensor, targets: Tensor, renders: Tensor) -> Image.Image:
    count = min(_SHOWN, len(targets))
    cells = [resize_images(image, targets)]
    for k in ((2 * k + 1) * len(targets) // (2 * count) for k in range(count)):
        cells += [targets[k], renders[k]]
    return Image.fromarray(to_uint8(torch.cat(cells, dim=-1).clamp(0, 1).permute(1, 2, 0)))
