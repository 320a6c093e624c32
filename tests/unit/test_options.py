"""Tests of options and checks shared by commands."""

import socket

import pytest

from lrm_pl.apps import demo, serve
from lrm_pl.apps.options import format_url, require_free
from lrm_pl.errors import InputError
from lrm_pl.inference.options import ServerLimits


@pytest.mark.parametrize("command", [demo, serve], ids=["demo", "serve"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_an_occupied_port_is_reported_before_a_model_is_loaded(command, host, tmp_path):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as other:
        try:
            other.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host} is not an address of this machine: {error}")
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"lrm: Cannot listen on {host}:{port}: .*in use. Choose"):
            command.main(["--host", host, "--port", str(port), "--ckpt", str(tmp_path)])


def test_an_invalid_address_is_rejected(tmp_path):
    for host, port in (("no.such.host.invalid", "8000"), ("127.0.0.1", "70000")):
        with pytest.raises(SystemExit, match=f"lrm: Cannot listen on {host}:{port}: "):
            serve.main(["--host", host, "--port", port, "--ckpt", str(tmp_path)])


@pytest.mark.parametrize(
    "name", ["megabytes", "megapixels", "seconds", "upload_seconds", "queue", "resolution"]
)
def test_invalid_request_limits_are_rejected(name):
    bad = -1 if name in ("queue", "resolution") else float("nan")
    with pytest.raises(InputError, match=f"expected {name} "):
        ServerLimits(**{name: bad})


def test_ipv6_addresses_in_urls_are_enclosed_in_brackets():
    assert format_url("::1", 80) == "http://[::1]:80"
    assert format_url("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_port_zero_is_rejected():
    with pytest.raises(InputError, match=r"found 0\. Choose a port, such as"):
        require_free("127.0.0.1", 0)
