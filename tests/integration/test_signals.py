"""Handling of signals, closed terminals and full disks."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time

import lightning as L
import pytest

from lrm_pl.checkpoints.index import list_checkpoints
from lrm_pl.cli.main import command_line, main
from lrm_pl.training.signals import REQUEUE_NOTE, StopSignals

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


class SignalAfterTraining(L.Callback):
    """Send SIGUSR1 to this process after training, before the report."""

    def on_fit_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGUSR1)


class Failing(L.Callback):
    """Raise an error during training."""

    def on_train_batch_end(self, *arguments):
        raise ArithmeticError("an error in a callback")


class FullDisk(L.Callback):
    """Write to a full disk."""

    def on_train_batch_end(self, *arguments):
        with open("/dev/full", "w") as file:
            file.write("anything")


def test_ctrl_c_saves_a_checkpoint_and_the_run_resumes_from_it(here, tmp_path):
    """The signal goes to the process group, including workers, as from a terminal."""
    command = [sys.executable, "-m", "lrm_pl", "fit", *here, "--run.folder=run", "--data.workers=2"]
    process = subprocess.Popen(
        [*command, "--trainer.max_steps=5000", "--trainer.log_every_n_steps=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: output.extend(process.stdout))
    reader.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/views/*step000002.png")) and process.poll() is None:
        assert time.monotonic() < deadline, output
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75, "".join(output)
    reader.join()
    text = "".join(output)
    assert "Saving a checkpoint and stopping after this step. Press Ctrl-C again" in text
    assert "stopped by a signal after step" in text
    assert "Traceback" not in text
    assert "--run.folder" in text
    (kept,) = list_checkpoints(str(tmp_path / "run/checkpoints"))[:1]
    step = int(kept.rpartition("-")[2])
    line = command_line(["fit", *here, "--run.folder=run", f"--trainer.max_steps={step + 2}"])
    assert line.trainer.callback_metrics["val/heldout/psnr_pooled"] > 0


def test_closing_the_terminal_saves_a_checkpoint(here, tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "lrm_pl", "fit", *here, "--run.folder=run", "--data.workers=1"]

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    process = subprocess.Popen(
        [*command, "--trainer.max_steps=5000"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/views/*step000002.png")) and process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 10_000)
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(60) == 75
    assert list_checkpoints(str(tmp_path / "run/checkpoints"))


def test_sighup_is_ignored_under_nohup(monkeypatch):
    signals, trainer = StopSignals(), L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.listen(trainer)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
        signals.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_second_signal_raises_keyboard_interrupt(first):
    before = signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    signals.listen(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    try:
        os.kill(os.getpid(), first)
        if first != signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.timeout(60)
def test_an_error_ends_a_run_with_data_workers(here):
    with pytest.raises(ArithmeticError, match="an error in a callback"):
        main(
            [
                "fit",
                *here,
                "--run.folder=run",
                "--data.workers=2",
                f"--trainer.callbacks+={__name__}.Failing",
            ]
        )


def test_a_full_disk_ends_the_run_with_one_message(here):
    with pytest.raises(
        SystemExit, match=r"^lrm: no space left .*No space left on device.*again with --run.folder"
    ):
        main(["fit", *here, "--run.folder=run", f"--trainer.callbacks+={__name__}.FullDisk"])


def test_a_closed_pipe_does_not_change_the_exit_status(root):
    code = "import sys; from lrm_pl.apps.broken_pipes import ignore_broken_pipes; ignore_broken_pipes(); "
    code += "print('begun', flush=True); sys.stdin.read(1); print('more'); sys.stderr.write('stopped'); sys.exit(75)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, **pipes) as process:
            assert process.stdout.readline() == b"begun\n"
            process.stdout.close()
            process.stdin.close()
            assert process.wait(60) == 75


def test_output_to_a_closed_stdout_is_discarded(root, tmp_path):
    code = "import os, sys; from lrm_pl.apps.broken_pipes import ignore_broken_pipes; ignore_broken_pipes(); "
    code += "file = open(sys.argv[1], 'wb'); print('output', flush=True); os.system('echo output')"
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    subprocess.run(closed, cwd=root, check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_read_only_folder_ends_the_run_with_one_message(here, monkeypatch):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(SystemExit, match=r"^lrm: no access to .*Read-only file system: 'runs.*--run"):
        main(["fit", *here])


def test_a_requeue_note_that_cannot_be_written_does_not_end_the_run(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(REQUEUE_NOTE, str(tmp_path / "gone" / "note"))
    signals = StopSignals()
    signals.listen(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    os.kill(os.getpid(), signal.SIGUSR1)
    signals.restore()
    assert signals.received is signal.SIGUSR1
    assert "will not be requeued" in caplog.text


def test_a_signal_during_the_report_exits_with_the_status_of_a_stopped_run(here, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *here, "--run.folder=run", f"--trainer.callbacks+={__name__}.SignalAfterTraining"])
    assert stopped.value.code == 75
    output = capsys.readouterr().err
    assert "a signal stopped the report after the last step. The checkpoint is " in output
    assert "To print the report, start the same command with --run.folder" in output
    assert signal.getsignal(signal.SIGUSR1) is before
