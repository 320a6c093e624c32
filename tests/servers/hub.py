"""A Hugging Face hub on loopback that serves one repository."""

import contextlib
import http.server
import json
import threading


class Hub(http.server.BaseHTTPRequestHandler):
    """Request handler for the endpoints that a download uses."""

    folder, repository, commit = None, "me/tiny", "1" * 40
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._serve(body=False)

    def do_GET(self):
        self._serve(body=True)

    def _serve(self, *, body):
        names = sorted(path.name for path in self.folder.iterdir())
        if self.path.startswith(f"/api/models/{self.repository}"):
            files = [{"rfilename": name} for name in names]
            content = json.dumps({"id": self.repository, "sha": self.commit, "siblings": files}).encode()
            if "/tree/" in self.path:
                content = json.dumps(
                    [
                        {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0" * 40}
                        for n in names
                    ]
                ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
        elif self.path.startswith(f"/{self.repository}/resolve/") and self.path.split("/")[-1] in names:
            content = (self.folder / self.path.split("/")[-1]).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{len(content)}-{self.path.split("/")[-1]}"')
            self.send_header("X-Repo-Commit", self.commit)
        else:
            content = b""
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub_with(folder, repository, monkeypatch):
    """Serve a folder as a repository, point the hub's client to it, and yield the address."""
    handler = type("OneHub", (Hub,), {"folder": folder, "repository": repository})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
