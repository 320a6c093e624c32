"""A real S3 server (moto) on loopback behind a proxy that can break requests, for tests of object stores."""

import logging

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from tests.servers.faulty_proxy import FaultyProxy


@pytest.fixture(scope="session")
def moto():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """Create the empty bucket s3://bucket and yield the proxy, which breaks no request by default."""
    proxy = FaultyProxy(*moto)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # by default a call is tried for minutes
    S3FileSystem.clear_instance_cache()  # one that is remembered knows another test's endpoint
    fs = fsspec.filesystem("s3")
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    proxy.seen.clear()
    yield proxy
    S3FileSystem.clear_instance_cache()
    proxy.stop()
