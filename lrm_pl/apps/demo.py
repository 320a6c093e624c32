"""``lrm demo``: a page in the browser. A photo goes in; its object without background, an orbit and a mesh come out."""

import argparse
import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.apps.options import add_address, add_background, add_network, require_free, url_of
from lrm_pl.errors import InputError
from lrm_pl.inference.locate import locate_network


def sweep(folder: Path, kept_s: float) -> None:
    """Remove what gradio forgets: uploads that were broken off, and empty folders of results.

    Args:
        folder: Of the visitors' files.
        kept_s: Age from which a file is removed, seconds.
    """
    for path in folder.glob("tmp*"):
        with contextlib.suppress(OSError):  # a folder that is not empty, a file that has gone
            if time.time() - path.stat().st_mtime >= kept_s:
                path.rmdir() if path.is_dir() else path.unlink()


def _keep_swept(folder: Path, kept_s: float, every_s: float) -> None:
    while True:
        time.sleep(every_s)
        sweep(folder, kept_s)


def forget_proxies() -> None:
    """Forget the proxies that the environment names.

    Gradio asks its own page, on this machine, whether it is up, and makes its client when it is imported: through a
    proxy the page is not found, and a SOCKS proxy wants a package that need not be there.
    """
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        del os.environ[name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    # Gradio reads these when it is imported: files of visitors lie in a folder that goes with the process.
    folder = Path(tempfile.mkdtemp(prefix="lrm-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in (signal.SIGTERM, signal.SIGHUP):  # else nothing is tidied up
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup
            signal.signal(name, lambda *_: sys.exit(0))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        sys.exit("lrm: expected gradio to show the page with, but found none; pip install -e '.[demo]'")
    try:
        locate_network(given.ckpt)
        require_free(given.host, given.port)
        from lrm_pl.apps.demo_page import KEPT_S, MEGABYTES, SWEEP_S, make_page
        from lrm_pl.inference.find_model import open_network

        trained = open_network(given)
        trained.model.remover.load()
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    if trained.note:
        print(trained.note)
    forget_proxies()
    page = make_page(trained, folder)
    page.launch(
        server_name=given.host,
        server_port=given.port,
        share=False,
        max_file_size=f"{MEGABYTES}mb",
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"{url_of(given.host, given.port)} shows {trained.source}; Ctrl-C ends it", flush=True)
    threading.Thread(target=_keep_swept, args=(folder, KEPT_S, SWEEP_S), daemon=True).start()
    page.block_thread()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm demo", description=__doc__)
    add_network(parser)
    add_address(parser, 7860)
    add_background(parser)
    return parser
