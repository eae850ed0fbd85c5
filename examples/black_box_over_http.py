"""A classifier that is known by its answers alone: a service over HTTP, judged by searches that count their questions.

The service is somebody's random forest behind `POST /predict`; here a thread of this very process plays it, on the
digits. There is no gradient, so only searches run, and the verdict says what their budget was. Run it:
python examples/black_box_over_http.py (some ten seconds)
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier

import sparring

THREAT = sparring.Linf(0.1)
NUM_EXAMPLES, NUM_QUERIES = 40, 300


@contextmanager
def service(model: Any) -> Iterator[str]:
    """The address of a service that answers rows (JSON lists) with probabilities."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(model.predict_proba(np.array(rows)).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/predict"
    finally:
        server.shutdown()
        server.server_close()


class Remote:
    """The client: probabilities (B, K) for arrays (B, *X). It counts what it asks, for the bill."""

    def __init__(self, address: str) -> None:
        self.address, self.calls, self.rows = address, 0, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        body = json.dumps(x.reshape(len(x), -1).round(6).tolist()).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address, body), timeout=30) as answer:
            return np.array(json.load(answer))


def main() -> tuple[sparring.Evaluation, Remote]:
    """The evaluation, and the client with its counts."""
    data = sparring.load_data("digits")
    forest = RandomForestClassifier(40, max_depth=12, random_state=0).fit(data.x_train.flatten(1), data.y_train)
    test = [(data.x_test[:NUM_EXAMPLES], data.y_test[:NUM_EXAMPLES])]
    with service(forest) as address:
        remote = Remote(address)
        model = sparring.BlackBox(remote, class_names=data.class_names)
        found = sparring.evaluate(model, test, THREAT, f"square:num_queries={NUM_QUERIES}")
    print(found)
    print(f"\n{remote.calls} calls asked for {remote.rows} rows; the bill of a service counts both.")
    return found, remote


if __name__ == "__main__":
    main()
