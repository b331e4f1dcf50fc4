"""EC2's instance metadata service (IMDSv2), played for tests."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator, Mapping, Sequence

Answers = Mapping[str, Sequence[str | int]]


@contextlib.contextmanager
def imds(answers: Answers) -> Iterator[str]:
    """Its URL. It answers who has a token: at each path of `meta-data/` one by one, the last for ever.

    A number is a status; a path that is not named has 404.
    """
    left = {path: list(texts) for path, texts in answers.items()}

    class Service(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            known = (
                "X-aws-ec2-metadata-token-ttl-seconds" in self.headers and self.path == "/latest/api/token"
            )
            self._say(200 if known else 400, "token")

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "token":
                self._say(401, "")
                return
            texts = left.get(self.path.removeprefix("/latest/meta-data/"), [404])
            answer = texts.pop(0) if len(texts) > 1 else texts[0]
            self._say(answer if isinstance(answer, int) else 200, str(answer))

        def _say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Nothing: a test says what it wants to know."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
