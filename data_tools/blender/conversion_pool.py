"""Blender processes that turn OBJ models into GLB, one after another; a model that kills one costs only itself.

The driver needs no Blender. A process receives ``ConversionTask`` objects through a pipe and returns an error or "".
"""

import dataclasses
import multiprocessing
import os
import queue
import tempfile
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

from data_tools.assets.archives import extract
from lrm_pl.data.manifest import write_atomically

#: Seconds that one model may take; most take less than one.
TIME_LIMIT_S = 300.0


@dataclasses.dataclass(frozen=True)
class ConversionTask:
    """One model to convert.

    Attributes:
        id: What the driver calls it.
        archive: The zip that holds it.
        members: Its files: path in a folder of its own -> name in the zip.
        obj: Which of these paths is the mesh.
        glb: The file to write.
    """

    id: str
    archive: Path
    members: dict[str, str]
    obj: str
    glb: Path


def convert_all(
    tasks: Sequence[ConversionTask], log: Path, jobs: int
) -> Iterator[tuple[ConversionTask, str]]:
    """Convert models on ``jobs`` processes; yields each with why it failed, or "", as it happens.

    Args:
        tasks: The models.
        log: File that gets what Blender prints.
        jobs: Number of processes.
    """
    processes = [_Process(log) for _ in range(jobs)]
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def convert(task: ConversionTask) -> str:
        process = idle.get()
        try:
            return process.convert(task)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(convert, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            for process in processes:
                process.end()


class _Process:
    """One Blender process; started when it is needed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection

    def convert(self, task: ConversionTask) -> str:
        if self._process is None or not self._process.is_alive():
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, self._log), daemon=True)
            self._process.start()
            theirs.close()  # else its death would not be noticed
        try:
            self._pipe.send(task)
            if self._pipe.poll(TIME_LIMIT_S):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return f"Blender died: with status {self._process.exitcode}; see {self._log}"
        self.end()
        return f"too slow: took longer than {TIME_LIMIT_S:g} s"

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, log: Path) -> None:
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the driver is gone
            return
        print(f"--- {task.id}", flush=True)
        try:
            _convert(task)
        except Exception as error:  # Blender's importers are scripts: a broken file may raise anything
            traceback.print_exc()
            pipe.send(f"not converted: {type(error).__name__}: {str(error).strip()}")
        else:
            pipe.send("")


def _convert(task: ConversionTask) -> None:
    from data_tools.blender.convert import convert_to_glb  # loads Blender

    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(task.archive) as archive:
        folder, textures = Path(name) / "model", Path(name) / "textures"
        folder.mkdir()
        textures.mkdir()
        extract(archive, task.members, folder)
        glb = Path(name) / "model.glb"
        convert_to_glb(folder / task.obj, glb, textures)
        write_atomically(task.glb, glb.read_bytes())
