"""A web server of one folder for tests: with byte ranges, or without, or one that fails at first."""

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextlib.contextmanager
def serve(folder: Path, *, ranges: bool = True, fails: int = 0) -> Iterator[tuple[str, list[str]]]:
    """The server's URL, and the requests that it received.

    Args:
        folder: what it serves.
        ranges: whether it gives parts of files; else it gives the whole, as Python's own server does.
        fails: answers before the first that is right.
    """
    asked: list[str] = []
    failures = iter(range(fails))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            asked.append(f"{self.command} {self.path} {span[0] if span else ''}".strip())
            path = folder / self.path.partition("?")[0].lstrip("/")
            content, code = (path.read_bytes(), 200) if path.is_file() else (b"", 404)
            if body and next(failures, None) is not None:
                content, code = b"", 503
            size = len(content)
            self.send_response(206 if span and code == 200 else code)
            if span and code == 200:
                first, last = int(span[1]), min(int(span[2] or size), size - 1)
                content = content[first : last + 1]
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            if code == 200:
                self.send_header("Last-Modified", str(path.stat().st_mtime_ns))
            self.send_header("Accept-Ranges", "bytes" if ranges else "none")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *about) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
