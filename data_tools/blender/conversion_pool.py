"""Pool of Blender processes that convert OBJ models to GLB. If a process crashes, only the current model fails.

Blender is not imported in the calling process.
"""

import dataclasses
import faulthandler
import multiprocessing
import os
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_tools.assets.archives import extract
from lrm_pl.data.manifest import write_atomically
from lrm_pl.orphans import end_with_parent

#: Time limit per model in seconds. The conversion of most models takes less than a second.
TIME_LIMIT_S = 300.0


@dataclasses.dataclass(frozen=True)
class ConversionTask:
    """A model to convert.

    Attributes:
        id: Id by which the caller identifies the model.
        archive: Zip file that contains the model.
        members: Mapping from destination paths to names in the zip file, for all files to extract.
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
    local = threading.local()  # each thread uses a process, which is started again after a crash

    def convert(task: ConversionTask) -> str:
        if not hasattr(local, "process"):
            context = multiprocessing.get_context("spawn")
            local.process = ProcessPoolExecutor(1, context, initializer=_start_process, initargs=(log,))
        try:
            return local.process.submit(_convert, task, TIME_LIMIT_S).result()
        except BrokenProcessPool:
            del local.process
            return f"Blender crashed or took longer than {TIME_LIMIT_S:g} s: see {log}"

    with ThreadPoolExecutor(jobs) as threads:
        futures = {threads.submit(convert, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _start_process(log: Path) -> None:
    """Redirect the output of a process to the log."""
    end_with_parent()
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _convert(task: ConversionTask, time_limit_s: float) -> str:
    """Convert a model, and return the error or "". If the time limit is exceeded, the process exits."""
    print(f"--- {task.id}", flush=True)
    faulthandler.dump_traceback_later(time_limit_s, exit=True)
    try:
        with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(task.archive) as archive:
            folder, textures = Path(name) / "model", Path(name) / "textures"
            folder.mkdir()
            textures.mkdir()
            extract(archive, task.members, folder)
            glb = Path(name) / "model.glb"
            from data_tools.blender.convert import convert_to_glb  # imports Blender, which is slow

            convert_to_glb(folder / task.obj, glb, textures)
            write_atomically(task.glb, glb.read_bytes())
    except Exception as error:  # Blender's importers can raise any exception
        traceback.print_exc()
        return f"conversion failed: {type(error).__name__}: {str(error).strip()}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""
