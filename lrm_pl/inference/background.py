"""Background removal with rembg (U^2-Net, Qin et al. 2020)."""

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lrm_pl.errors import InputError
from lrm_pl.weights.pypi_mirror import read_member
from lrm_pl.weights.resolve import WeightSource, resolve


class RemoverError(InputError):
    """Error raised if background removal is unavailable, regardless of the image."""


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
                expected="an installation of rembg for background removal",
                found="none",
                remedy="install it with pip install -e '.[infer]', or use images with an alpha channel",
            ) from error
        try:
            found = resolve("u2netp", source=self._source, path=self._path, sha256=self._sha256)
            member = found.file.member if found.file else ""
            content = read_member(found.path, member) if member else found.path.read_bytes()
            self._session = _open_session(content, found.path)
        except (InputError, OSError) as error:
            raise RemoverError(f"The network for background removal cannot be loaded. {error}") from error
        provider = self._session.inner_session.get_providers()[0].removesuffix("ExecutionProvider")
        self.description = f"rembg, {found.description}, on {provider}"


def _open_session(content: bytes, source: Path) -> Any:  # noqa: ANN401 - rembg is untyped
    """Create a rembg session from the content of an ONNX file that was read from ``source``."""
    import onnxruntime
    from rembg.sessions.u2net_custom import U2netCustomSession

    class Session(U2netCustomSession):  # type: ignore[misc]
        @classmethod
        def download_models(cls, *_: object, **options: str) -> str:
            """Return the given path instead of copying the file into rembg's model folder."""
            return options["model_path"]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # suppresses warnings about missing GPU libraries
    with tempfile.TemporaryDirectory(prefix="lrm-u2netp-") as folder:  # rembg requires a path
        file = Path(folder) / "u2netp.onnx"
        file.write_bytes(content)
        try:
            return Session("u2net_custom", options, model_path=str(file))
        except Exception as error:  # the exceptions of onnxruntime have no common base class
            raise InputError(subject=source, expected="an ONNX file of U^2-Net", found=error) from error
