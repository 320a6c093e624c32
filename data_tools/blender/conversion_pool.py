"""Pool of Blender processes that convert OBJ models to GLB. If a process crashes, only the current model fails.

Blender is not imported in the calling process. A Blender process receives ``ConversionTask`` objects through a pipe and
returns an error or "".
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

#: Time limit per model in seconds. The conversion of most models takes less than a second.
TIME_LIMIT_S = 300.0


@dataclasses.dataclass(frozen=True)
class ConversionTask:
    """A model to convert.

    Attributes:
        id: Id by which the caller identifies the model.
        archive: Zip file that contains the model.
        members: Mapping from the paths of files to extract to their names in the zip file.
        obj: Path of the OBJ, which is a key of ``members``.
        glb: Path of the output file.
    """

    id: str
    archive: Path
    members: dict[str, str]
    obj: str
    glb: Path


def convert_all(
    tasks: Sequence[ConversionTask], log: Path, jobs: int
) -> Iterator[tuple[ConversionTask, str]]:
    """Convert models in several processes.

    Args:
        tasks: Models to convert.
        log: File to which the output of Blender is appended.
        jobs: Number of processes.

    Yields:
        A tuple (task, error) when a model is complete or has failed. The error is "" if the model was converted.
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
                process.kill()


class _Process:
    """A Blender process that is started on first use and restarted after a crash."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection

    def convert(self, task: ConversionTask) -> str:
        if self._process is None or not self._process.is_alive():
            self._pipe, child_pipe = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(child_pipe, self._log), daemon=True)
            self._process.start()
            child_pipe.close()  # otherwise, the end of the process would not be detected
        try:
            self._pipe.send(task)
            if self._pipe.poll(TIME_LIMIT_S):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return f"Blender crashed: exit status {self._process.exitcode}; see {self._log}"
        self.kill()
        return f"timeout: conversion took longer than {TIME_LIMIT_S:g} s"

    def kill(self) -> None:
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
        except EOFError:  # the driver has exited
            return
        print(f"--- {task.id}", flush=True)
        try:
            _convert(task)
        except Exception as error:  # Blender's importers can raise any exception
            traceback.print_exc()
            pipe.send(f"conversion failed: {type(error).__name__}: {str(error).strip()}")
        else:
            pipe.send("")


def _convert(task: ConversionTask) -> None:
    from data_tools.blender.convert import convert_to_glb  # imports Blender, which is slow

    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(task.archive) as archive:
        folder, textures = Path(name) / "model", Path(name) / "textures"
        folder.mkdir()
        textures.mkdir()
        extract(archive, task.members, folder)
        glb = Path(name) / "model.glb"
        convert_to_glb(folder / task.obj, glb, textures)
        write_atomically(task.glb, glb.read_bytes())
