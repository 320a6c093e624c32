"""HTTP server of ``lrm serve``. POST /reconstruct accepts an image and returns a GLB file.

    curl --data-binary @photo.png http://127.0.0.1:8000/reconstruct -o mesh.glb

One image is processed at a time, and other requests wait in a queue of limited length. GET /health returns the status,
GET /metrics returns Prometheus metrics, and GET /docs returns the documentation of the API.
"""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from lrm_pl import __version__
from lrm_pl.errors import InputError
from lrm_pl.images import ImageError, ImageTooLargeError, NotAnImageError, open_image
from lrm_pl.inference.options import MAX_FACES, MIN_SERVER_RESOLUTION, MeshOptions, ServerLimits
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import make_mesh, to_tensor
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.progress import listening, stage

logger = logging.getLogger(__name__)

#: HTTP status of the errors of a reconstruction. The first class that matches is used.
_STATUSES = ((ImageTooLargeError, 413), (NotAnImageError, 415), (ImageError, 400), (InputError, 422))

#: Interval in seconds between checks for disconnected clients.
_POLL_S = 0.5

#: Maximum number of connections in addition to the queue, for uploads and other requests. It limits the memory that
#: uploads occupy.
_EXTRA_CONNECTIONS = 64

#: Maximum time in seconds that running requests may take after a stop signal.
_SHUTDOWN_S = 30


class RequestError(Exception):
    """Exception that is raised if a request is rejected.

    Args:
        status: HTTP status.
        detail: Reason, which is sent to the client.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class ReconstructionQueue:
    """Queue of images that are reconstructed one at a time in a worker thread.

    Args:
        pipeline: Trained model.
        limits: Request limits.

    Attributes:
        waiting: Number of running and waiting requests.
        is_stopping: Function that returns whether the server is shutting down. Waiting requests are then rejected.
    """

    def __init__(self, pipeline: LRMPipeline, limits: ServerLimits) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.waiting = 0
        self.is_stopping: Callable[[], bool] = lambda: False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reconstruct")

    async def reconstruct(
        self, content: bytes, options: MeshOptions, disconnected: Callable[[], Awaitable[bool]]
    ) -> tuple[bytes, dict[str, float]]:
        """Reconstruct an encoded image.

        Args:
            content: Content of the image file.
            options: Options for the mesh.
            disconnected: Function that returns whether the client has disconnected.

        Returns:
            The content of the GLB file, and the duration of each stage in seconds.

        Raises:
            RequestError: The queue is full, the client has disconnected, the server is shutting down, the time limit
                was exceeded, or the image cannot be reconstructed.
        """
        if self.waiting > self.limits.queue or self.is_stopping():
            raise RequestError(
                503, f"The queue is full: {self.waiting} requests are running or waiting. Retry later."
            )
        self.waiting += 1
        canceled = threading.Event()
        deadline = time.monotonic() + self.limits.seconds
        future = self._thread.submit(self._reconstruct, content, options, deadline, canceled)
        result = asyncio.wrap_future(future)
        # asyncio logs errors of futures whose result is not read because the client has disconnected
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not result.done():
                await asyncio.wait({result}, timeout=_POLL_S)
                if not result.done() and await disconnected():
                    raise RequestError(499, "The client has disconnected.")
                if self.is_stopping() and future.cancel():
                    raise RequestError(503, "The server is shutting down. Retry later.")
            return result.result()
        except asyncio.CancelledError:
            raise RequestError(503, "The server has shut down. Retry later.") from None
        finally:
            canceled.set()
            future.cancel()
            self.waiting -= 1

    def _reconstruct(
        self, content: bytes, options: MeshOptions, deadline: float, canceled: threading.Event
    ) -> tuple[bytes, dict[str, float]]:
        def check(name: str) -> None:
            if canceled.is_set():
                raise RequestError(499, "The client has disconnected.")
            if time.monotonic() > deadline:
                raise RequestError(
                    504,
                    f"The time limit of {self.limits.seconds:g} s was exceeded before the stage {name!r}.",
                )

        with listening(check, self.pipeline.synchronize) as seconds:
            try:
                with stage("image"):
                    image = open_image(
                        content,
                        "the image",
                        max_bytes=int(self.limits.megabytes * 1e6),
                        max_pixels=int(self.limits.megapixels * 1e6),
                    )
                scene = self.pipeline(to_tensor(self.pipeline.preprocess(image)))
                mesh, _ = make_mesh(scene, options)
            except InputError as error:
                status = next(status for kind, status in _STATUSES if isinstance(error, kind))
                raise RequestError(status, str(error)) from error
            with stage("files"):
                return encode_glb(mesh), seconds

    def close(self) -> None:
        """Wait until the running reconstruction is complete, and stop the worker thread."""
        self._thread.shutdown(wait=True)


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Read the body of a request.

    A body that is too large is received completely and discarded, unless the time limit is exceeded. If the server
    closed the connection during the upload, the client would not read the response.

    Raises:
        RequestError: The body is too large, the time limit of the upload was exceeded, or the upload was interrupted.
    """
    max_bytes = int(limits.megabytes * 1e6)
    content, size = bytearray(), 0
    too_large = RequestError(413, f"The image file is larger than {limits.megabytes:g} MB.")
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    content += chunk
    except TimeoutError as error:
        length = request.headers.get("content-length", "")
        if size > max_bytes or (length.isdigit() and int(length) > max_bytes):
            raise too_large from error
        raise RequestError(408, f"The image was not received within {limits.upload_seconds:g} s.") from error
    except ClientDisconnect as error:
        raise RequestError(400, "The upload was interrupted.") from error
    if size > max_bytes:
        raise too_large
    return bytes(content)


def describe_non_image(content: bytes, content_type: str) -> str:
    """Return a description of the content if it is not an image, or an empty string if it may be an image.

    Only types that clients commonly send by mistake are recognized.

    Args:
        content: Body of the request.
        content_type: Value of the Content-Type header.
    """
    if content_type.startswith("multipart/"):
        return "a form"
    if not content:
        return "an empty body"
    if content[:2] == b"\x1f\x8b":
        return "gzip"
    if content.lstrip()[:1] in (b"{", b"[", b'"'):
        return "JSON"
    if content[:5] == b"data:" or re.fullmatch(rb"[A-Za-z0-9+/=\s]+", content[:4096]):
        return "text such as base64"
    # The option -d of curl removes newlines and null bytes, which occur at the beginning of PNG and JPEG files.
    if content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0") and not {10, 0} & set(content[:4096]):
        return "an image without newlines and null bytes, as sent by curl -d"
    return ""


def make_app(queue: ReconstructionQueue, limits: ServerLimits) -> FastAPI:
    """Create the FastAPI application.

    Args:
        queue: Queue of reconstructions.
        limits: Request limits.
    """
    registry = CollectorRegistry()
    requests = Counter(
        "lrm_requests", "Requests to /reconstruct by HTTP status", ["status"], registry=registry
    )
    waiting = Gauge("lrm_waiting", "Running and waiting requests", registry=registry)
    waiting.set_function(lambda: queue.waiting)
    seconds = Histogram(
        "lrm_stage_seconds", "Duration of each stage of a reconstruction", ["stage"], registry=registry,
        buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
    )  # fmt: skip
    status = {"status": "ok", "network": queue.pipeline.source, "sha256": queue.pipeline.sha256}

    class Parameters(BaseModel, extra="forbid"):
        """Query parameters of /reconstruct."""

        resolution: int = Field(min(256, limits.resolution), ge=MIN_SERVER_RESOLUTION, le=limits.resolution)
        threshold: float | None = Field(None, gt=0, allow_inf_nan=False)
        floaters: float = Field(0.0, ge=0, le=1)
        max_faces: int | None = Field(None, ge=4, le=MAX_FACES, alias="faces")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(
        title="lrm", version=__version__, description=__doc__, lifespan=lifespan, redirect_slashes=False
    )

    @app.exception_handler(RequestValidationError)
    async def count_invalid(request: Request, error: RequestValidationError) -> Response:
        requests.labels(422).inc()
        return await request_validation_exception_handler(request, error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refer_to_docs(request: Request, error: Any) -> Response:  # noqa: ANN401 - Starlette's
        detail = f"{request.method} {request.url.path}: {error.detail}. See GET /docs."
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    async def handle(request: Request, options: MeshOptions) -> tuple[bytes, dict[str, float]]:
        content = await read_body(request, limits)
        parameters = request.query_params
        if len(parameters.multi_items()) > len(parameters):
            raise RequestError(422, f"A parameter is specified more than once: {parameters}.")
        if found := describe_non_image(content, request.headers.get("content-type", "")):
            raise RequestError(
                415,
                f"The body must be an image file, but it is {found}. Use `curl --data-binary @photo.png`.",
            )
        return await queue.reconstruct(content, options, request.is_disconnected)

    # The path with a slash is not redirected because clients may not send the image again after a redirect.
    @app.post("/reconstruct/", include_in_schema=False)
    @app.post(
        "/reconstruct",
        responses={200: {"content": {"model/gltf-binary": {}}, "description": "The mesh"}},
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {}}}},
    )
    async def reconstruct(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        """Reconstruct the image in the body (PNG, JPEG, WebP, BMP, TIFF or AVIF), and return a GLB file."""
        try:
            options = MeshOptions(**parameters.model_dump())
            glb, stages = await handle(request, options)
        except RequestError as error:
            requests.labels(error.status).inc()
            headers = {"Retry-After": "10"} if error.status == 503 else {}
            return JSONResponse({"detail": error.detail}, error.status, headers)
        except Exception:  # a bug must not stop the server
            logger.exception("request failed")
            requests.labels(500).inc()
            return JSONResponse({"detail": "Internal error; see the log of the server."}, 500)
        requests.labels(200).inc()
        for name, value in stages.items():
            seconds.labels(name).observe(value)
        return Response(glb, media_type="model/gltf-binary")

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    @app.head("/health", include_in_schema=False)
    @app.head("/health/", include_in_schema=False)
    @app.get("/health/", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return the status, the model and the number of running and waiting requests."""
        return {**status, "waiting": queue.waiting}

    @app.get("/metrics/", include_in_schema=False)
    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


def serve(pipeline: LRMPipeline, limits: ServerLimits, host: str, port: int) -> None:
    """Run the server until it receives a stop signal.

    The running request is then completed, and waiting requests are rejected.

    Args:
        pipeline: Trained model.
        limits: Request limits.
        host: Address to listen on.
        port: Port to listen on.
    """
    queue = ReconstructionQueue(pipeline, limits)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(queue, limits),
            host=host,
            port=port,
            http="h11",
            h11_max_incomplete_event_size=1 << 16,
            limit_concurrency=limits.queue + _EXTRA_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    queue.is_stopping = lambda: server.should_exit
    server.run()
