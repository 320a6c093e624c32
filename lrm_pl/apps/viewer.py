"""The page of ``lrm view``: fly around what a run reconstructs, also while it trains.

The page draws the current field at the visitor's camera, shows the cameras of the object's views as frusta, and takes
over new checkpoints as they appear.
"""

import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.spatial.transform import Rotation

from lrm_pl.checkpoints import find_checkpoint, list_checkpoints, load_network
from lrm_pl.data.manifest import MANIFEST_NAME, Split
from lrm_pl.data.schema import SampleError, decode_image
from lrm_pl.errors import InputError
from lrm_pl.evaluation.dataset import EvaluationDataset, NoObjectsError
from lrm_pl.evaluation.objects import over_white
from lrm_pl.evaluation.protocols import Protocol
from lrm_pl.evaluation.run import reconstruct_sample
from lrm_pl.geometry.cameras import canonicalize
from lrm_pl.inference.model_folder import CONFIG_NAME, WEIGHTS_NAME, find_config
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import Scene
from lrm_pl.kernels.device import choose_device
from lrm_pl.rendering.empty_space import measure_occupancy
from lrm_pl.storage import is_local

logger = logging.getLogger(__name__)

#: Height of an image while the camera moves, and once it rests, pixels.
_MOVING, _RESTING = 96, 288

#: Seconds without a movement after which the camera rests; between two looks for new checkpoints.
_REST_S, _POLL_S = 0.4, 3.0

#: Objects of each split to choose from.
_OBJECTS = 24

#: Of the frusta's depth, scene units.
_FRUSTUM = 0.2


@dataclasses.dataclass
class Sight:
    """What one visitor sees.

    Attributes:
        moved: When the camera was last moved, seconds of ``time.monotonic``.
        drawn: Height of what was drawn last; 0: something else must be drawn now.
    """

    moved: float = 0.0
    drawn: int = 0


class Viewer:
    """The page of a run.

    Args:
        run: The run's folder.
        data: Folder of the shards whose objects are shown.
        device: Where it computes.
        host: Address that it listens at.
        port: Port.
    """

    def __init__(self, run: str, data: str, device: str, host: str, port: int) -> None:
        import viser

        self.run = run
        self.pipeline = LRMPipeline.from_pretrained(run).to(choose_device(device))
        self.objects = {key: (objects, place) for key, objects, place in _choices(data)}
        self._checkpoint = self.pipeline.source
        self._sights: dict[int, Sight] = {}
        self._lock = threading.RLock()  # one computes at a time
        self._frusta: list[Any] = []
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        self.server.scene.set_up_direction("+z")
        self.server.scene.world_axes.visible = False
        gui = self.server.gui
        gui.add_markdown(f"**{run}**")
        self.state = gui.add_markdown("")
        self.object = gui.add_dropdown("object", tuple(self.objects))
        most = max(objects.manifest.views for objects, _ in self.objects.values())
        self.view = gui.add_slider("input view", 0, max(1, most - 1), 1, 0)
        self.input = gui.add_image(np.full((8, 8, 3), 255, np.uint8), label="input")
        self.checkpoint = gui.add_dropdown(
            "checkpoint", self._checkpoints(), initial_value=Path(self._checkpoint).name
        )
        self.follow = gui.add_checkbox("follow the run", initial_value=True)
        self.threshold = gui.add_slider("hide densities below", 0.0, 30.0, 0.5, 0.0)
        self.frusta = gui.add_checkbox("cameras", initial_value=True)
        self._show_first()
        for control in (self.object, self.view):
            control.on_update(lambda _: self._show_object())
        self.checkpoint.on_update(self._pick)
        self.threshold.on_update(lambda _: self._draw_anew())
        self.frusta.on_update(lambda _: self._show_frusta())
        self.server.on_client_connect(self._enter)
        self.server.on_client_disconnect(lambda client: self._sights.pop(client.client_id, None))

    def serve(self) -> None:
        """Draw for all visitors, and look for new checkpoints, until the process ends."""
        looked = time.monotonic()
        while True:
            busy = False
            for client in self.server.get_clients().values():
                sight = self._sights.get(client.client_id)
                if sight is None:
                    continue
                height = _RESTING if time.monotonic() - sight.moved > _REST_S else _MOVING
                if height != sight.drawn:
                    busy = True
                    sight.drawn = height
                    try:
                        self._draw(client, height)
                    except Exception:  # a visitor whose camera is no camera, or who left, is no reason to end
                        logger.exception("could not draw for visitor %d", client.client_id)
            if time.monotonic() - looked > _POLL_S:
                looked = time.monotonic()
                self._look_for_checkpoints()
            if not busy:
                time.sleep(0.02)

    def _enter(self, client: Any) -> None:  # noqa: ANN401 - viser's client
        away = self.scene.camera.distance
        client.camera.position, client.camera.look_at = (0.8 * away, -1.5 * away, 0.8 * away), (0.0, 0.0, 0.0)
        client.camera.fov = float(np.radians(self.scene.camera.fov_deg))
        sight = self._sights[client.client_id] = Sight()

        def moved(_: Any) -> None:  # noqa: ANN401 - viser's camera
            sight.moved, sight.drawn = time.monotonic(), 0

        client.camera.on_update(moved)

    @torch.no_grad()
    def _draw(self, client: Any, height: int) -> None:  # noqa: ANN401 - viser's client
        camera = client.camera
        c2w = torch.eye(4)
        c2w[:3, :3] = torch.from_numpy(Rotation.from_quat(np.roll(camera.wxyz, -1)).as_matrix()).float()
        c2w[:3, 3] = torch.from_numpy(np.asarray(camera.position, dtype=np.float32))
        focal = 0.5 / np.tan(camera.fov / 2)
        fxfycxcy = torch.tensor([focal / camera.aspect, focal, 0.5, 0.5])
        width = max(8, round(height * camera.aspect))
        with self._lock:
            field, occupancy = self._shown
            device = field.planes.device
            with torch.autocast(device.type, torch.bfloat16):
                seen = self.scene.renderer.draw(
                    field,
                    [occupancy],
                    c2w.to(device)[None, None],
                    fxfycxcy.to(device)[None, None],
                    (height, width),
                )
        rgb = seen.over(torch.ones(3, device=device))[0, 0].clamp(0, 1).cpu().numpy()
        # frusta in front of the object cover it, others are covered
        z = seen.depth * _cosines(fxfycxcy, height, width).to(device)
        depth = torch.where(seen.opacity > 0.5, z, 100.0)[0, 0].cpu().numpy()
        client.scene.set_background_image((rgb * 255).astype(np.uint8), format="jpeg", depth=depth)

    def _show_first(self) -> None:
        """Show the first object that can be read.

        Raises:
            InputError: None can.
        """
        for name in self.objects:
            self.object.value = name
            if self._show_object():
                return
        raise InputError(
            expected="an object that can be read", found="none", remedy=f"the first: {self.state.content}"
        )

    def _show_object(self) -> bool:
        """Reconstruct the chosen object from the chosen view, and draw it; returns whether it can be read."""
        objects, place = self.objects[self.object.value]
        views = tuple(range(objects.manifest.views))
        view = min(int(self.view.value), len(views) - 1)
        with self._lock:
            try:
                sample = objects.read(place, Protocol("view", "", inputs=(view,), targets=views))
            except (InputError, SampleError, OSError) as error:  # shards may go while they are looked at
                self.state.content = f"{self.object.value}: {error}"
                return False
            image = over_white(sample, (view,))[0]
            self._sample, self._c2w = sample, canonicalize(torch.from_numpy(sample.c2w[[view, *views]]))[1:]
            self.scene: Scene = reconstruct_sample(self.pipeline, sample, view)
            self.input.image = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            self._draw_anew()
            self._show_frusta()
        step = "" if self.pipeline.step is None else f", step {self.pipeline.step}"
        self.state.content = f"{Path(self._checkpoint).name}{step}"
        return True

    def _draw_anew(self) -> None:
        """Hide what is less dense than wished, and have every visitor's image drawn."""
        with self._lock:
            field, least = self.scene.field, float(self.threshold.value)
            if least:
                activation = field.activation
                field = dataclasses.replace(
                    field, activation=lambda raw: activation(raw) * (activation(raw) >= least)
                )
            self._shown = field, measure_occupancy(field, 0)
        for sight in list(self._sights.values()):
            sight.drawn = 0

    def _show_frusta(self) -> None:
        with self._lock:
            for frustum in self._frusta:
                frustum.remove()
            self._frusta = []
            if not self.frusta.value:
                return
            for number, c2w in enumerate(self._c2w.numpy()):
                focal = float(self._sample.fxfycxcy[number, 1])
                pixels = decode_image(self._sample.info.id, self._sample.views[number])[::2, ::2]
                frustum = self.server.scene.add_camera_frustum(
                    f"/cameras/{number:03d}",
                    fov=float(2 * np.arctan(0.5 / focal)),
                    aspect=pixels.shape[1] / pixels.shape[0],
                    scale=_FRUSTUM,
                    thickness=0.008,
                    image=pixels,
                    color=(230, 120, 20) if number == int(self.view.value) else (90, 90, 90),
                    wxyz=np.roll(Rotation.from_matrix(c2w[:3, :3]).as_quat(), 1),
                    position=c2w[:3, 3],
                )
                self._frusta.append(frustum)

    def _checkpoints(self) -> tuple[str, ...]:
        folder = str(Path(self._checkpoint).parent)
        names = {Path(path).name for path in list_checkpoints(folder)}
        names.add(Path(self._checkpoint).name)  # it may be gone already
        return tuple(sorted(names))

    def _newest(self) -> str:
        """Name the run's newest checkpoint; the one that is shown may be a later one of a run that began anew."""
        kept = list_checkpoints(str(Path(self._checkpoint).parent))
        return max((Path(path).name for path in kept), default=Path(self._checkpoint).name)

    def _look_for_checkpoints(self) -> None:
        names = self._checkpoints()
        if names != tuple(self.checkpoint.options):
            self.checkpoint.options = names
        newest = self._newest()
        if self.follow.value and newest != Path(self._checkpoint).name:
            self.checkpoint.value = newest
            self._choose(newest)

    def _pick(self, event: Any) -> None:  # noqa: ANN401 - viser's event
        """Take over the checkpoint that a visitor picked; one that is not the newest stays."""
        if event.client_id is None:
            return
        if self.checkpoint.value != self._newest():
            self.follow.value = False
        self._choose(self.checkpoint.value)

    def _choose(self, name: str) -> None:
        """Take over the weights of another checkpoint."""
        path = str(Path(self._checkpoint).with_name(name))
        if path == self._checkpoint:
            return
        with self._lock:
            try:
                checkpoint = find_checkpoint(path)
                load_network(checkpoint, self.pipeline.network, average=False)
            except (InputError, OSError) as error:  # it was removed, as old ones are
                logger.warning("%s", error)
                return
            self._checkpoint = path
            self.pipeline.source, self.pipeline.step = path, checkpoint.step
            self._show_object()


def _cosines(fxfycxcy: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return how much of a step along each pixel's ray goes along the camera's z axis."""
    y = ((torch.arange(height) + 0.5) / height - 0.5) / fxfycxcy[1]
    x = ((torch.arange(width) + 0.5) / width - 0.5) / fxfycxcy[0]
    return (1 + y[:, None] ** 2 + x**2).rsqrt()


def wait_for_checkpoint(run: str) -> None:
    """Wait until a run that has begun keeps its first checkpoint."""
    if not is_local(run):
        return
    folder = Path(run).expanduser()
    checkpoints = str(folder / "checkpoints")
    if (
        not (folder / CONFIG_NAME).is_file()
        or (folder / WEIGHTS_NAME).is_file()
        or list_checkpoints(checkpoints)
    ):
        return
    print(f"{run} has begun; waiting for its first checkpoint ... Ctrl-C ends it", flush=True)
    while not list_checkpoints(checkpoints):
        time.sleep(_POLL_S)


def data_of(run: str) -> str:
    """Return the folder of shards that a run trains on.

    Raises:
        InputError: The run has no checkpoint, or no config.
    """
    config = yaml.safe_load(find_config(find_checkpoint(run), None).read_text())
    return str(config.get("data", {}).get("folder"))


def _choices(data: str) -> list[tuple[str, EvaluationDataset, Any]]:
    """List objects to choose from: held-out ones first."""
    if is_local(data) and not (Path(data) / MANIFEST_NAME).is_file():
        raise InputError(
            expected=f"finished shards in {data}",
            found="none",
            remedy="name the run's: --data FOLDER (a relative path begins where you are)",
        )
    found = []
    splits: tuple[Split, ...] = ("val", "train")
    for split in splits:
        try:
            objects = EvaluationDataset(data, split, limit=_OBJECTS)
        except NoObjectsError:
            continue
        found += [(f"{split}: {key}", objects, place) for key, place in objects.samples]
    if not found:
        raise InputError(
            expected=f"objects in {data}", found="none", remedy="render some, or name other shards: --data"
        )
    return found
