"""An adapter store that can misbehave: files of a folder over HTTP, with the standard library alone.

python faults_store.py FOLDER PORT

The file `how` in the folder says how: `well`, `slowly SECONDS`, `corrupt`.
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """PUT keeps a body, GET and HEAD give it back."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        self._give(body=True)

    def do_HEAD(self) -> None:
        self._give(body=False)

    def do_PUT(self) -> None:
        data = (
            self.rfile.read(int(self.headers["content-length"])) if "content-length" in self.headers else self._chunks()
        )
        self._wait()
        self._file().write_bytes(data)
        self._reply(201, b"", True)

    def do_POST(self) -> None:
        self.do_PUT()

    def log_message(self, *_: object) -> None:
        pass

    def _give(self, *, body: bool) -> None:
        how = self._wait()
        file = self._file()
        if not file.is_file():
            return self._reply(404, b"", body)
        data = file.read_bytes()
        if how == "corrupt":
            data = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        self._reply(200, data, body)

    def _wait(self) -> str:
        how = self.folder / "how"
        words = how.read_text().split() if how.exists() else ["well"]
        if words[0] == "slowly":
            time.sleep(float(words[1]))
        return words[0]

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _file(self) -> Path:
        return self.folder / Path(self.path).name

    def _reply(self, status: int, data: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
