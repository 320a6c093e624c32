"""Measure one object: reconstruct it from its inputs, compare images and surfaces with the truth."""

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
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.meshing.surface import NoSurfaceError
from lrm_pl.meshing.triangles import sample_surface
from lrm_pl.metrics import NotFiniteError, psnr, ssim
from lrm_pl.progress import stage

#: Image embeddings (n, d) of images (n, 3, h, w) in [0, 1].
Embed = Callable[[Tensor], Tensor]

#: Makes a scene of an input view: RGBA (4, h, w), its c2w and fxfycxcy, canonical.
Reconstruct = Callable[[Tensor, Tensor, Tensor], Scene]

#: Targets that the strip of images shows.
_SHOWN = 4

#: Images that are measured at a time.
_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class PerceptualMetrics:
    """What images are measured with besides arithmetic.

    Attributes:
        lpips: Name -> network.
        clip: CLIP's image embeddings; None leaves CLIP similarity out.
        features: Features of FID and KID; None leaves these out.
    """

    lpips: Mapping[str, PerceptualLoss]
    clip: Embed | None = None
    features: Embed | None = None


@dataclasses.dataclass(frozen=True)
class ObjectResult:
    """What was found about one object.

    Attributes:
        rows: "model" and the baselines -> metric -> mean over the object's images, or of its surface.
        strip: (3, H, W) input | target, render, target, render ...
        features: "target", "model" and the baselines -> features of all images, where these were asked for.
        notes: What could not be measured, and why.
    """

    rows: dict[str, dict[str, float]]
    strip: Float[Tensor, "3 H W"]
    features: dict[str, Float[np.ndarray, "n d"]]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, bytes]:
        """The strip and the features as files: ending -> content."""
        pixels = (self.strip.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        return {".png": file.getvalue()} | (features_file(self.features) if self.features else {})


def features_file(features: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Encode features as ``folder.read_features`` reads them: ending -> content."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {name.replace(" ", "_"): values for name, values in features.items()}
    np.savez(file, **arrays)
    return {".npz": file.getvalue()}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A trivial answer.

    Attributes:
        make: Input image (3, h, w) and targets (n, 3, h, w) -> answers of the targets' shape.
        uses_input: Whether it depends on the input.
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
    """Measure one object, in float32 without TF32, where the network draws it.

    Args:
        sample: The object, with the views that the protocol needs.
        protocol: What is measured.
        reconstruct: The network.
        perceptual: What images are measured with.
        baselines: What else is measured, where images are.

    Raises:
        SampleError: A view cannot be read, or there is no true surface where the protocol needs one.
        NotFiniteError: The network draws values that are not finite.
    """
    targets = over_white(sample, protocol.rendered)
    size = targets.shape[-2], targets.shape[-1]
    answers: dict[str, list[Tensor]] = {"model": []}
    surface: dict[str, list[float]] = {}
    notes = list[str]()
    strip: Tensor | None = None
    for view in protocol.inputs:
        image = over_white(sample, (view,))[0]
        rgba = input_view(sample, view)
        c2w = canonicalize(torch.from_numpy(sample.c2w[[view, *protocol.rendered]]))
        fxfycxcy = torch.from_numpy(sample.fxfycxcy[[view, *protocol.rendered]])
        scene = reconstruct(rgba, c2w[0], fxfycxcy[0])
        with stage("views"):
            renders = _render(scene, c2w[1:], fxfycxcy[1:], size)
        if not torch.isfinite(renders).all():
            raise NotFiniteError(
                subject=f"sample {sample.info.id!r}",
                expected="finite views",
                found="values that are NaN or infinite",
                remedy="the network has diverged: take an earlier checkpoint",
            )
        image, targets = image.to(renders.device), targets.to(renders.device)
        answers["model"].append(renders)
        _add_baselines(answers, baselines, image, targets)
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
            for name, row in _measure_images(answers, targets, perceptual).items():
                rows[name] = rows.get(name, {}) | row
            features = _features(answers | {"target": [targets]}, perceptual)
    return ObjectResult(rows, strip.cpu(), features, tuple(notes))


@torch.no_grad()
def measure_baselines(
    sample: Sample,
    protocol: Protocol,
    perceptual: PerceptualMetrics,
    baselines: Mapping[str, Baseline],
    device: torch.device,
) -> tuple[dict[str, dict[str, float]], dict[str, Float[np.ndarray, "n d"]]]:
    """Measure baselines of an object whose network is measured already, as ``measure_object`` does.

    Args:
        sample: The object, with the views that the protocol needs.
        protocol: What is measured; it compares images.
        perceptual: What images are measured with.
        baselines: What is measured.
        device: The network's.

    Returns:
        The baselines' rows, and their features.

    Raises:
        SampleError: A view cannot be read.
    """
    targets = over_white(sample, protocol.rendered).to(device)
    answers = dict[str, list[Tensor]]()
    for view in protocol.inputs:
        _add_baselines(answers, baselines, over_white(sample, (view,))[0].to(device), targets)
    with stage("metrics"), without_tf32():
        return _measure_images(answers, targets, perceptual), _features(answers, perceptual)


def _add_baselines(
    answers: dict[str, list[Tensor]], baselines: Mapping[str, Baseline], image: Tensor, targets: Tensor
) -> None:
    """Add what baselines answer to an input; those that do not look at it answer once."""
    for name, baseline in baselines.items():
        if baseline.uses_input or name not in answers:
            answers.setdefault(name, []).append(baseline.predict(image, targets))


def _features(
    images: Mapping[str, list[Tensor]], perceptual: PerceptualMetrics
) -> dict[str, Float[np.ndarray, "n d"]]:
    """Return the features of FID and KID of each row's images; nothing without a network for them."""
    if perceptual.features is None:
        return {}
    return {name: perceptual.features(torch.cat(each)).float().cpu().numpy() for name, each in images.items()}


def true_surface(sample: Sample, view: int, geometry: SurfaceSettings) -> PointCloud:
    """Return the true surface as the input view's canonical frame has it.

    Raises:
        SampleError: The sample has none.
    """
    if SURFACE_MEMBER not in sample.extras:
        raise SampleError(
            subject=f"sample {sample.info.id!r}",
            expected=f"{SURFACE_MEMBER}, the true surface",
            found="none",
            remedy='render the shards with ARGS="--surface"',
        )
    points, normals = decode_surface(sample.info.id, sample.extras[SURFACE_MEMBER])
    turn = canonical_rotation(torch.from_numpy(sample.c2w[view])).double().numpy()
    truth = PointCloud(
        points[: geometry.points].astype(np.float64), normals[: geometry.points].astype(np.float64)
    )
    truth = truth.transformed(turn)
    return truth.normalized() if geometry.normalized else truth


def _measure_surface(
    row: dict[str, list[float]], scene: Scene, sample: Sample, view: int, geometry: SurfaceSettings
) -> str:
    """Add the scores of a mesh; returns why there is none, or nothing."""
    truth = true_surface(sample, view, geometry)
    try:
        mesh = scene.mesh(resolution=geometry.resolution)
    except NoSurfaceError as error:
        for threshold in geometry.thresholds:  # no point is near: distances are not defined, scores are
            row.setdefault(f_score_name(threshold), []).append(0.0)
        return f"view {view}: {error}"
    rng = sample_rng(0, view, sample.info.id)
    prediction = PointCloud(
        *sample_surface([(mesh.vertices.astype(np.float64), mesh.faces)], geometry.points, rng)
    )
    if geometry.normalized:
        prediction = prediction.normalized()
    if geometry.aligned:
        prediction = align(prediction, truth)
    add_surface(row, compare_surfaces(prediction, truth, geometry.thresholds))
    return ""


def add_surface(row: dict[str, list[float]], scores: SurfaceScores) -> None:
    """Add the scores of one surface to a row, by the names of ``surface_metrics``."""
    values = {"chamfer": scores.chamfer, "normal_consistency": scores.normal_consistency}
    values |= {f_score_name(threshold): value for threshold, value in scores.f_scores.items()}
    for name, value in values.items():
        row.setdefault(name, []).append(value)


def decode_view(sample: Sample, view: int) -> Float[Tensor, "4 h w"]:
    """Decode a view, RGBA with straight alpha.

    Raises:
        SampleError: It cannot be read.
    """
    return to_tensor(decode_image(sample.info.id, sample.views[view]))


def input_view(sample: Sample, view: int) -> Float[Tensor, "4 h w"]:
    """Decode a view that is to be reconstructed from.

    Raises:
        SampleError: It cannot be read, or shows nothing.
    """
    rgba = decode_view(sample, view)
    if not rgba[3].any():
        raise SampleError(
            subject=f"sample {sample.info.id!r}",
            expected=f"an object in view {view}",
            found="alpha 0 everywhere",
        )
    return rgba


def over_white(sample: Sample, views: tuple[int, ...]) -> Float[Tensor, "n 3 h w"]:
    """Decode views and put them over white.

    Raises:
        SampleError: One cannot be read, or they differ in size.
    """
    rgba = [decode_view(sample, view) for view in views]
    if len({image.shape for image in rgba}) > 1:
        raise SampleError(subject=f"sample {sample.info.id!r}", expected="views of one size", found="several")
    pixels = torch.stack(rgba)
    return pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]


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
    answers: Mapping[str, list[Tensor]], targets: Tensor, perceptual: PerceptualMetrics
) -> dict[str, dict[str, float]]:
    """Measure all answers; what is known of the targets is found out once."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in answers}
    for start in range(0, len(targets), _IMAGES):
        theirs = targets[start : start + _IMAGES]
        known = {name: _features_of(network, theirs) for name, network in perceptual.lpips.items()}
        clip = None if perceptual.clip is None else perceptual.clip(theirs)
        for name, row in values.items():
            for answer in answers[name]:
                ours = answer[start : start + _IMAGES]
                once = ours[:1] if ours.stride(0) == 0 else ours  # one image for all targets
                found = {"psnr": psnr(ours, theirs), "ssim": ssim(ours, theirs)}
                for kind, network in perceptual.lpips.items():
                    found[f"lpips_{kind}"] = network.distance(_features_of(network, once), known[kind])
                if perceptual.clip is not None and clip is not None:
                    found["clip"] = torch.nn.functional.cosine_similarity(perceptual.clip(once), clip, dim=-1)
                figures = torch.stack([figure.to(ours.device) for figure in found.values()]).cpu()
                # A baseline that repeats the input equals it in that one view: no figure of a comparison.
                counts = figures[0].isfinite()
                for metric, figure in zip(found, figures, strict=True):
                    row.setdefault(metric, []).extend(figure[counts].tolist())
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
