"""An HTTP proxy on loopback that breaks chosen requests, as a faulty network does."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = b"<Error><Code>%s</Code><Message>injected</Message></Error>"


class FaultyProxy:
    """Forward requests to a server, or break those that ``fault`` selects.

    ``fault(method, path, number)`` is called for every request, where ``number`` counts earlier equal requests. It
    returns None, "drop" (close the connection without forwarding), "deaf" (forward, but drop the response), "cut"
    (close the connection after half of the response body), "slow" (delay the response by half a second), "503" or
    "500".
    """

    def __init__(self, host, port):
        self.fault, self.seen, self.broken = (lambda method, path, number: None), {}, []
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    number = proxy.seen[self.command, self.path] = (
                        proxy.seen.get((self.command, self.path), -1) + 1
                    )
                fault = proxy.fault(self.command, self.path, number)
                if fault:
                    proxy.broken.append((self.command, self.path, fault))
                if fault in ("500", "503"):
                    content = ERROR % (b"InternalError" if fault == "500" else b"SlowDown")
                    return self.answer(int(fault), {}, content)
                if fault == "drop":
                    self.close_connection = True
                    return None
                connection = http.client.HTTPConnection(host, port, timeout=30)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "expect"}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                if fault == "deaf":
                    self.close_connection = True
                    return None
                if fault == "slow":
                    time.sleep(0.5)
                return self.answer(response.status, dict(response.getheaders()), content, cut=fault == "cut")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

            def answer(self, status, headers, content, cut=False):
                self.send_response_only(status)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                skipped = ("content-length", "transfer-encoding", "connection")
                for key, value in headers.items():
                    if key.lower() not in skipped:
                        self.send_header(key, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                    self.close_connection = self.close_connection or cut

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)
