"""The trainer of tests in pods: ``POST /publish?version=3`` publishes the weights that version 3 has by its number.

Runs in a pod, from a ConfigMap; ``GET /`` answers its run. An answer is one JSON object.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PORT = 9000
PUBLISH_SECONDS = 60.0
SEED = 1000
"""Seed of version 0's weights; the servers start from another."""
DEVICE = os.environ.get("DEVICE", "cpu")
"""Where the weights are published from."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        from weightsync_engine.client import default_run

        self._answer(200, {"run": default_run()})

    def do_POST(self) -> None:
        from weightsync_engine.client import PublishError, publish
        from weightsync_engine.reference.model_files import TINY, random_weights

        version = int(parse_qs(urlsplit(self.path).query)["version"][0])
        try:
            weights = {
                name: tensor.to(DEVICE) for name, tensor in random_weights(TINY, SEED + version).items()
            }
            done = publish(weights, version, timeout=PUBLISH_SECONDS)
        except PublishError as error:
            self._answer(409, {"error": str(error)})
        else:
            self._answer(200, {"digest": done.digest})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        print(self.requestline, code, flush=True)

    def _answer(self, status: int, document: dict[str, str]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", PORT), Handler).serve_forever()
