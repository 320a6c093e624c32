"""Background removal with rembg (U^2-Net, Qin et al. 2020)."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lrm_pl.errors import InputError
from lrm_pl.weights.pypi_mirror import read_member
from lrm_pl.weights.resolve import WeightsError, WeightSource, resolve

#: SHA-256 of the ONNX file of the small network. The file has the MD5 that rembg pins.
U2NETP_SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"


class RemoverError(InputError):
    """Exception that is raised if background removal is not available for any image."""


class BackgroundRemover:
    """Callable that removes backgrounds with the small U^2-Net of rembg, which is loaded when first used.

    Args:
        source: Allowed providers of the weights.
        path: Path of the ONNX file. If None, the cache is searched and the file is downloaded if necessary.
        sha256: SHA-256 of the file at ``path``. If None, the file must be in the catalog.

    Attributes:
        description: Description of the network and the execution provider. Empty until the network is loaded.
    """

    def __init__(
        self, source: WeightSource = "any", path: str | Path | None = None, sha256: str | None = None
    ) -> None:
        self._source, self._path, self._sha256 = source, path, sha256
        self._session: Any = None
        self.description = ""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image as RGBA with a transparent background.

        Raises:
            RemoverError: rembg is not installed, or the network cannot be loaded.
        """
        self.load()
        import rembg

        return rembg.remove(image.convert("RGB"), session=self._session)

    def load(self) -> None:
        """Load the network if it has not been loaded yet.

        Raises:
            RemoverError: rembg is not installed, or the network cannot be loaded.
        """
        if self._session is not None:
            return
        try:
            import rembg  # noqa: F401
        except ImportError as error:
            raise RemoverError(
                expected="rembg for background removal",
                found="none",
                remedy="install it with pip install -e '.[infer]', or use images with an alpha channel",
            ) from error
        try:
            self._session = self._load()
        except (InputError, OSError) as error:
            raise RemoverError(f"The network for background removal cannot be loaded. {error}") from error

    def _load(self) -> Any:  # noqa: ANN401 - rembg is untyped
        import onnxruntime
        from rembg.sessions.u2net_custom import U2netCustomSession

        found = resolve("u2netp", source=self._source, path=self._path, sha256=self._sha256)
        if found.file is not None and found.file.member:
            content = read_member(found.path, found.file.member)
            if (sha256 := hashlib.sha256(content).hexdigest()) != U2NETP_SHA256:
                raise WeightsError(
                    subject="u2netp", expected=f"sha256 {U2NETP_SHA256} in {found.path}", found=sha256
                )
        else:
            content = found.path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # suppresses warnings about missing GPU libraries

        class Session(U2netCustomSession):  # type: ignore[misc]
            @classmethod
            def download_models(cls, *_: object, **options: str) -> str:
                """Return the given path. The method of the base class would copy the file into a folder of rembg."""
                return options["model_path"]

        with tempfile.TemporaryDirectory(prefix="lrm-u2netp-") as folder:  # rembg requires a path
            file = Path(folder) / "u2netp.onnx"
            file.write_bytes(content)
            try:
                session = Session("u2net_custom", options, model_path=str(file))
            except Exception as error:  # the exceptions of onnxruntime have no common base class
                raise InputError(
                    subject=found.path, expected="an ONNX file of U^2-Net", found=error
                ) from error
        provider = session.inner_session.get_providers()[0].removesuffix("ExecutionProvider")
        self.description = f"rembg, {found.description}, on {provider}"
        return session
