"""A stand-in for the service: the same wire, random ink, no model. It records what it is asked."""

import contextlib
import json
import random
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from tests.local import Handler

MODEL = {
    "name": "pixelcnn-mnist5k",
    "version": "3",
    "run_id": "0a1b2c",
    "git_commit": "0123456789abcdef",
    "data_hash": "d41d8cd98f00b204e9800998ecf8427e",
    "weights_sha256": "0" * 64,
}


def served(shape: tuple[int, int, int], levels: int, labels: list[str], protocol: str) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "levels": levels,
        "labels": labels,
        "protocol": protocol,
        "architecture": "gated_pixelcnn",
        "promoted_at": "2025-01-01T00:00:00+00:00",
        "model": MODEL,
        "scores": {
            **{"test/nll_nats": 98.765, "test/bits_per_dim": 3.21, "test/num_images": 500},
            **{"test/nll_nats_uniform": 17034.26, "num_parameters": 724850},
        },
    }


MODELS = {
    "cifar10": served((3, 32, 32), 256, ["airplane", "automobile"], "8-bit"),
    "fashion_mnist": served((1, 28, 28), 256, ["T-shirt/top", "Trouser"], "8-bit"),
    "mnist5k": served((1, 28, 28), 2, [str(i) for i in range(10)], "dynamic"),
}


class StubService:
    """An HTTP server in a thread of its own.

    Args:
        port: 0 for any free one.
        row_s: seconds between two rows of a stream, and before a likelihood.
    """

    def __init__(self, port: int = 0, row_s: float = 0.0) -> None:
        self.models: dict[str, Any] = dict(MODELS)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.clients: list[str | None] = []  # the names by which they came
        self.answers: list[dict[str, Any]] = []
        self.num_listed = 0  # times that somebody asked what is served
        self.refusal: tuple[int, str] | None = None  # (status, body) of the next POSTs
        self.break_stream = False  # end streams after some rows, without a result
        self.row_s = row_s
        self.hurry = threading.Event()  # set: no more pauses
        stub = self

        class Stub(Handler):
            def do_GET(self) -> None:
                stub.num_listed += self.path == "/models"
                self._json(200 if self.path == "/models" else 404, stub.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, body))
                stub.clients.append(self.headers["X-Client"])
                if stub.refusal:
                    status, sentence = stub.refusal
                    # Or a client that asks again would wait for seconds.
                    self.reply(status, sentence.encode(), Content_Type="application/json", Retry_After="0")
                elif self.path == "/generate":
                    self._json(200, stub.generated(body))
                elif self.path == "/likelihood":
                    stub.hurry.wait(stub.row_s)
                    self._json(200, stub.likelihood(body))
                elif self.path == "/complete_stream":
                    self._stream(stub.answer(body))

            def _stream(self, answer: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(b": drawing\n\n")
                for row in range(len(answer["completions"][0])):
                    if stub.break_stream and row == 20:
                        return
                    stub.hurry.wait(stub.row_s)
                    rows = {"start": row, "rows": [[image[row]] for image in answer["completions"]]}
                    self.wfile.write(f"event: rows\ndata: {json.dumps(rows)}\n\n".encode())
                self.wfile.write(f"event: result\ndata: {json.dumps(answer)}\n\n".encode())

            def _json(self, status: int, values: Any) -> None:
                self.reply(status, json.dumps(values).encode(), Content_Type="application/json")

            def handle(self) -> None:
                # The client may go away in mid-answer, as a page does when it is redrawn.
                with contextlib.suppress(ConnectionError):
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Stub)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep what is observed; put random ink into the middle of the rest, or any colours."""
        seed = body["seed"] if body.get("seed") is not None else 4711
        draw = random.Random(seed)
        top = self.models[body["dataset"]]["levels"] - 1
        colour = self.models[body["dataset"]]["shape"][0] == 3

        def drawn(x: int, y: int) -> Any:
            if colour:
                return [draw.randint(0, top) for _ in range(3)]
            return top * (6 <= x < 22 and y < 25 and draw.random() < 0.3)

        completions = [
            [
                [level if known else drawn(x, y) for x, (level, known) in enumerate(zip(*rows, strict=True))]
                for y, rows in enumerate(zip(body["image"], body["observed"], strict=True))
            ]
            for _ in range(body["num_samples"])
        ]
        log_probs = [-10.0 - 40 * draw.random() for _ in completions]
        answer = {"completions": completions, "log_probs": log_probs, "seed": seed, "model": MODEL}
        self.answers.append(answer)
        return answer

    def generated(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return whole images of random levels."""
        channels, height, width = self.models[body["dataset"]]["shape"]
        seed = body["seed"] if body.get("seed") is not None else 4711
        draw = random.Random(seed)

        def pixel() -> Any:
            levels = [draw.randrange(self.models[body["dataset"]]["levels"]) for _ in range(channels)]
            return levels if channels == 3 else levels[0]

        images = [[[pixel() for _ in range(width)] for _ in range(height)] for _ in range(body["num_samples"])]
        return {"images": images, "log_probs": [-100 * draw.random() for _ in images], "seed": seed, "model": MODEL}

    def likelihood(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a nat for each inked pixel, half as many when told that the image is a 4."""
        each = 0.5 if body["label"] == 4 else 1.0
        surprise = [[each * (level != 0) for level in row] for row in body["image"]]
        total = sum(map(sum, surprise))
        return {
            "log_prob": -total,
            "bits_per_dim": total / 543.4,
            "packed_bytes": 11,
            "surprise": surprise,
            "model": MODEL,
        }

    def close(self) -> None:
        """Stop listening: the port refuses connections from now on."""
        self._server.shutdown()
        self._server.server_close()
