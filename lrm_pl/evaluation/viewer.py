"""Web page of ``lrm view``, which is based on viser.

The page renders the reconstruction of an object from the camera of each visitor and shows the cameras of the object's
views as frusta. New checkpoints of the run are loaded automatically.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import viser
import yaml
from scipy.spatial.transform import Rotation

from lrm_pl.checkpoints.index import list_checkpoints
from lrm_pl.checkpoints.network import load_network
from lrm_pl.checkpoints.selection import find_checkpoint
from lrm_pl.data.manifest import Split
from lrm_pl.data.schema import SampleError, decode_image
from lrm_pl.errors import InputError
from lrm_pl.evaluation.dataset import EvaluationDataset, NoObjectsError
from lrm_pl.evaluation.objects import decode_over_white, reconstruct_sample
from lrm_pl.evaluation.protocols import Protocol
from lrm_pl.geometry.cameras import canonicalize
from lrm_pl.inference.model_folder import CONFIG_NAME, WEIGHTS_NAME, find_config
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import Scene
from lrm_pl.kernels.device import choose_device
from lrm_pl.rendering.empty_space import measure_occupancy
from lrm_pl.storage import is_local

logger = logging.getLogger(__name__)

#: Heights in pixels of renderings while the camera moves and while it is at rest.
_MOVING, _RESTING = 96, 288

#: Time in seconds without movement after which a camera is considered to be at rest, and interval in seconds between
#: checks for new checkpoints.
_REST_S, _POLL_S = 0.4, 3.0

#: Maximum number of objects per split.
_OBJECTS = 24

#: Depth of the camera frusta in scene units.
_FRUSTUM = 0.2


@dataclasses.dataclass
class ClientView:
    """Rendering state of a visitor.

    Attributes:
        moved: Time of the last camera movement, as returned by ``time.monotonic``.
        height: Height of the current rendering in pixels, or 0 if the rendering is outdated.
    """

    moved: float = 0.0
    height: int = 0


class Viewer:
    """Web viewer for the reconstructions of a run.

    Args:
        run: Path or URL of the run folder.
        data: Path or URL of the folder of shards with the objects to show.
        device: Device of the model, or "auto".
        host: Address to listen on.
        port: Port to listen on.
    """

    def __init__(self, run: str, data: str, device: str, host: str, port: int) -> None:
        self.pipeline = LRMPipeline.from_pretrained(run).to(choose_device(device))
        self.objects = _list_objects(data)
        self._views: dict[int, ClientView] = {}
        self._lock = threading.RLock()  # guards the scene and the device
        self._frusta: list[viser.CameraFrustumHandle] = []
        self.server = viser.ViserServer(host=host, port=port, verbose=False)
        self.server.scene.set_up_direction("+z")
        self.server.scene.world_axes.visible = False
        gui = self.server.gui
        gui.add_markdown(f"**{run}**")
        self.state = gui.add_markdown("")
        self.object = gui.add_dropdown("object", tuple(self.objects))
        max_views = max(dataset.manifest.views for dataset, _ in self.objects.values())
        self.view = gui.add_slider("input view", 0, max(1, max_views - 1), 1, 0)
        self.input = gui.add_image(np.full((8, 8, 3), 255, np.uint8), label="input")
        self.checkpoint = gui.add_dropdown("checkpoint", self._checkpoints(), initial_value=self._loaded)
        self.follow = gui.add_checkbox("follow the run", initial_value=True)
        self.threshold = gui.add_slider("minimum density", 0.0, 30.0, 0.5, 0.0)
        self.frusta = gui.add_checkbox("cameras", initial_value=True)
        self._show_first_object()
        self.object.on_update(lambda _: self._show_object())
        self.view.on_update(lambda _: self._show_object())
        self.checkpoint.on_update(self._on_checkpoint)
        self.threshold.on_update(lambda _: self._update_field())
        self.frusta.on_update(lambda _: self._show_frusta())
        self.server.on_client_connect(self._on_connect)
        self.server.on_client_disconnect(lambda client: self._views.pop(client.client_id, None))

    def serve(self) -> None:
        """Render for all visitors and load new checkpoints until the process ends."""
        checked = time.monotonic()
        while True:
            rendered = [self._refresh(client) for client in self.server.get_clients().values()]
            if time.monotonic() - checked > _POLL_S:
                checked = time.monotonic()
                self._check_for_checkpoints()
            if not any(rendered):
                time.sleep(0.02)

    def _refresh(self, client: viser.ClientHandle) -> bool:
        """Render for a visitor if the current rendering is outdated.

        Returns:
            Whether the rendering was outdated.
        """
        view = self._views.get(client.client_id)
        height = _RESTING if view and time.monotonic() - view.moved > _REST_S else _MOVING
        if view is None or height == view.height:
            return False
        view.height = height
        try:
            self._render(client, height)
        except Exception:  # an invalid camera or a disconnected visitor must not stop the viewer
            logger.exception("rendering for visitor %d failed", client.client_id)
        return True

    def _on_connect(self, client: viser.ClientHandle) -> None:
        distance = self.scene.camera.distance
        client.camera.position = (0.8 * distance, -1.5 * distance, 0.8 * distance)
        client.camera.look_at = (0.0, 0.0, 0.0)
        client.camera.fov = float(np.radians(self.scene.camera.fov_deg))
        view = self._views[client.client_id] = ClientView()

        def on_move(_: viser.CameraHandle) -> None:
            view.moved, view.height = time.monotonic(), 0

        client.camera.on_update(on_move)

    @torch.no_grad()
    def _render(self, client: viser.ClientHandle, height: int) -> None:
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
                output = self.scene.renderer.draw(
                    field,
                    [occupancy],
                    c2w.to(device)[None, None],
                    fxfycxcy.to(device)[None, None],
                    (height, width),
                )
        rgb = output.over(torch.ones(3, device=device))[0, 0].clamp(0, 1).cpu().numpy()
        # With the depth, the object occludes the frusta behind it.
        z = output.depth * _cosines(fxfycxcy, height, width).to(device)
        depth = torch.where(output.opacity > 0.5, z, 100.0)[0, 0].cpu().numpy()
        client.scene.set_background_image((rgb * 255).astype(np.uint8), format="jpeg", depth=depth)

    def _show_first_object(self) -> None:
        """Show the first object that can be read.

        Raises:
            InputError: No object can be read.
        """
        for name in self.objects:
            self.object.value = name
            if self._show_object():
                return
        raise InputError(f"No object can be read. The last error was: {self.state.content}")

    def _show_object(self) -> bool:
        """Reconstruct the selected object from the selected view, and show the result.

        Returns:
            Whether the object could be read.
        """
        dataset, location = self.objects[self.object.value]
        views = tuple(range(dataset.manifest.views))
        view = min(int(self.view.value), len(views) - 1)
        with self._lock:
            try:
                sample = dataset.read(location, Protocol("view", "", inputs=(view,), targets=views))
            except (InputError, SampleError, OSError) as error:  # the shards may have been deleted
                self.state.content = f"{self.object.value}: {error}"
                return False
            image = decode_over_white(sample, (view,))[0]
            self._sample, self._c2w = sample, canonicalize(torch.from_numpy(sample.c2w[[view, *views]]))[1:]
            self.scene: Scene = reconstruct_sample(self.pipeline, sample, view)
            self.input.image = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            self._update_field()
            self._show_frusta()
        step = "" if self.pipeline.step is None else f", step {self.pipeline.step}"
        self.state.content = f"{self._loaded}{step}"
        return True

    def _update_field(self) -> None:
        """Apply the minimum density to the field, and mark all renderings as outdated."""
        with self._lock:
            field, minimum = self.scene.field, float(self.threshold.value)
            if minimum:
                activation = field.activation
                field = dataclasses.replace(
                    field, activation=lambda raw: activation(raw) * (activation(raw) >= minimum)
                )
            self._shown = field, measure_occupancy(field, 0)
        for view in list(self._views.values()):
            view.height = 0

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

    @property
    def _loaded(self) -> str:
        """Name of the loaded checkpoint."""
        return Path(self.pipeline.source).name

    def _checkpoints(self) -> tuple[str, ...]:
        """Return the names of the checkpoints of the run, newest first. The loaded checkpoint is always included."""
        saved = [Path(path).name for path in list_checkpoints(str(Path(self.pipeline.source).parent))]
        return tuple(dict.fromkeys([*saved, self._loaded]))

    def _check_for_checkpoints(self) -> None:
        names = self._checkpoints()
        if names != tuple(self.checkpoint.options):
            self.checkpoint.options = names
        if self.follow.value and names[0] != self._loaded:
            self.checkpoint.value = names[0]
            self._load(names[0])

    def _on_checkpoint(self, event: viser.GuiEvent) -> None:
        """Load the checkpoint that a visitor selected, and stop following the run if it is not the newest one."""
        if event.client_id is not None:
            if self.checkpoint.value != self._checkpoints()[0]:
                self.follow.value = False
            self._load(self.checkpoint.value)

    def _load(self, name: str) -> None:
        """Load the weights of the checkpoint with the given name, unless they are already loaded."""
        path = str(Path(self.pipeline.source).with_name(name))
        if path == self.pipeline.source:
            return
        with self._lock:
            try:
                checkpoint = find_checkpoint(path)
                load_network(checkpoint, self.pipeline.network, average=False)
            except (InputError, OSError) as error:  # the run may have deleted the checkpoint
                logger.warning("%s", error)
                return
            self.pipeline.source, self.pipeline.step = path, checkpoint.step
            self._show_object()


def _cosines(fxfycxcy: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the cosines of the angles between the rays of the pixels and the z axis of the camera."""
    y = ((torch.arange(height) + 0.5) / height - 0.5) / fxfycxcy[1]
    x = ((torch.arange(width) + 0.5) / width - 0.5) / fxfycxcy[0]
    return (1 + y[:, None] ** 2 + x**2).rsqrt()


def has_no_checkpoint(run: str) -> bool:
    """Return whether a local run has started but has not saved a checkpoint yet."""
    folder = Path(run).expanduser()
    return (
        is_local(run)
        and (folder / CONFIG_NAME).is_file()
        and not (folder / WEIGHTS_NAME).is_file()
        and not list_checkpoints(str(folder / "checkpoints"))
    )


def find_data(run: str) -> str:
    """Return the folder of the shards that a run was trained on.

    Raises:
        InputError: The run has no checkpoint or no config.
    """
    config = yaml.safe_load(find_config(find_checkpoint(run), None).read_text())
    return str(config.get("data", {}).get("folder"))


def _list_objects(data: str) -> dict[str, tuple[EvaluationDataset, Any]]:
    """Return the objects that can be selected, by name. Held-out objects come first."""
    found = dict[str, tuple[EvaluationDataset, Any]]()
    splits: tuple[Split, ...] = ("val", "train")
    for split in splits:
        with contextlib.suppress(NoObjectsError):
            dataset = EvaluationDataset(data, split, limit=_OBJECTS)
            found |= {f"{split}: {key}": (dataset, location) for key, location in dataset.samples}
    if not found:
        raise InputError(
            subject=data, expected="objects", found="none", remedy="pass other shards with --data FOLDER"
        )
    return found
