"""A web server of a folder, as a process of its own, that sends parts of files and fails on demand.

It also plays the few endpoints of the Hugging Face hub and of Google's store that listing and reading need.
Each line that it prints after the first is a request: its method, its path and its range.
"""

import contextlib
import json
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    import pytest


class Server:
    """The server, and what it was asked."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.address = f"http://127.0.0.1:{self.port}"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def requests(self) -> list[str]:
        """The requests since the last call."""
        time.sleep(0.2)  # what was answered has been printed, but perhaps not read
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines


@contextlib.contextmanager
def serving(folder: Path, port: int = 0, **faults: float | str) -> Iterator[Server]:
    """A server of a folder.

    Args:
        port: 0 is any.
        faults: drop: of so many requests for parts one loses its connection in the middle; fail: one is
            answered by 503; slow: seconds before each answer; status: of every answer; to: where every
            request is redirected; whole: no parts are sent; tree: a name that the hub lists besides.
    """
    arguments = [sys.executable, __file__, str(folder), str(port), json.dumps(faults)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@contextlib.contextmanager
def store() -> Iterator[str]:
    """The address of moto's server, which plays Amazon's S3."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def hub_at(address: str, monkeypatch: "pytest.MonkeyPatch") -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers wait for the client to confirm
    counter = iter(range(1, 1 << 60))

    def __init__(self, folder: Path, faults: dict, *arguments: object) -> None:
        self.folder, self.faults = folder, faults
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        print(f"{self.command} {self.path} {self.headers.get('Range', '-')}\n", end="", flush=True)
        time.sleep(self.faults.get("slow", 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if status := self.faults.get("status"):
            return self.send(int(status), b"no")
        if to := self.faults.get("to"):
            return self.send(302, b"", Location=to + self.path)
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)(/revision/.+)?", path):
            return self.hub_about(match[1])
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)/tree/(refs/convert/parquet|[^/]+)(/.*)?", path):
            return self.hub_tree(match[1], (match[3] or "").strip("/"), "recursive=true" in url.query.lower())
        if match := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", path):
            return self.send(302, b"", Location=f"/{match[1]}/{quote(match[3])}?Signature=secret")
        if match := re.fullmatch(r"/storage/v1/b/(\w+)/o", path):
            return self.store_list(match[1], parse_qs(url.query).get("prefix", [""])[0])
        if match := re.fullmatch(r"(/download)?/storage/v1/b/(\w+)/o/(.+)", path):
            if not match[1] and "alt=media" not in url.query:
                return self.store_about(match[2], match[3])
            path = f"/{match[2]}/{match[3]}"
        return self.send_file(self.folder / path.lstrip("/"))

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            return self.send(404, b"not there")
        content = file.read_bytes()
        headers = {"ETag": sha1(content).hexdigest(), "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or self.faults.get("whole"):
            return self.send(200, content, **headers)
        part = content[int(match[1]) : int(match[2]) + 1]
        headers["Content-Range"] = f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(content)}"
        number = next(self.counter)
        if self.faults.get("fail") and number % int(self.faults["fail"]) == 0:
            return self.send(503, b"busy")
        if self.faults.get("drop") and number % int(self.faults["drop"]) == 0:
            self.send(206, part, cut=len(part) // 2, **headers)
            self.close_connection = True
            return None
        return self.send(206, part, **headers)

    def send(self, status: int, content: bytes, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def below(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def hub_about(self, name: str) -> None:
        if not (self.folder / name).is_dir():
            return self.send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        return self.send_json({"id": name, "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    def hub_tree(self, name: str, inside: str, recursive: bool) -> None:
        root = self.folder / name
        entries = []
        for path in sorted((root / inside).rglob("*") if recursive else (root / inside).iterdir()):
            entry = {"path": str(path.relative_to(root)), "size": 0, "oid": "0", "type": "directory"}
            if path.is_file():
                content = path.read_bytes()
                entry |= {"size": len(content), "oid": sha1(content).hexdigest(), "type": "file"}
            entries.append(entry)
        if "tree" in self.faults:
            entries.append({**entries[-1], "path": self.faults["tree"]})
        return self.send_json(entries)

    def store_item(self, bucket: str, path: Path) -> dict[str, str]:
        root = self.folder / bucket
        name, generation = str(path.relative_to(root)), sha1(path.read_bytes()).hexdigest()
        return {"name": name, "bucket": bucket, "size": str(path.stat().st_size), "generation": generation}

    def store_list(self, bucket: str, prefix: str) -> None:
        root = self.folder / bucket
        paths = [path for path in self.below(root) if str(path.relative_to(root)).startswith(prefix)]
        self.send_json({"items": [self.store_item(bucket, path) for path in paths]})

    def store_about(self, bucket: str, name: str) -> None:
        path = self.folder / bucket / name
        if not path.is_file():
            return self.send(404, b'{"error": {"code": 404, "message": "Not Found"}}')
        return self.send_json(self.store_item(bucket, path))


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None:  # a client that did not wait for its answer
        pass


if __name__ == "__main__":
    handler = partial(Handler, Path(sys.argv[1]), json.loads(sys.argv[3]))
    with QuietServer(("127.0.0.1", int(sys.argv[2])), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
