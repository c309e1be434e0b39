"""Measure a running service through HTTP, as its clients see it: `python -m benchmarks.service`.

Latency of /complete with 4 candidates of a test image's upper half, and of the first rows of /complete_stream, for each
dataset; then throughput with 1, 8, 32 and 128 clients that each ask for one completion after the other, of a drawing
of its own or of the same. One client asks for one thing at a time, so nothing is batched for it: it is what the others
are compared with.

    python -m benchmarks.service --canvases 30 --strokes 20

does what so many canvases do at once: a stroke of a second, of which three parts are sent and left again, then nine
endings of the whole, timed from the stroke's end; then two seconds of looking, in which it is said how probable each
ending is. A stroke draws the upper half of one of the canvas's test images, each time elsewhere. No page is shown.
"""

import contextlib
import functools
import gc
import json
import math
import os
import random
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection, HTTPSConnection
from statistics import median
from typing import Annotated, Any

import httpx
import numpy as np
from typer import Option, run

from app.canvas.drawing import TOUCHED, Drawing, known_cells, levels_of, per_cell, strength_of, without
from app.canvas.examples import real_images
from app.canvas.waiting import in_background
from app.client import TOKEN_VARIABLE, Completions, Image, Rows, ServedModel, ServiceClient, ServiceError, service_url

NUM_CANDIDATES = 4
TIMEOUT_S = 300
NUM_ENDINGS = 9
PART_S, LOOK_S = 0.25, 2.0  # between the parts of a stroke that are sent; between two strokes
NUM_BODIES = 512  # different requests of the second table


def drawing_of(dataset: str, served: ServedModel, draw: random.Random) -> Drawing:
    """Return the upper half of one of the canvas's test images, moved a little; of noise where it has none."""
    channels, height, width = served.shape
    images = real_images(dataset)
    if images:
        strength = np.roll(draw.choice(images), (draw.randint(-2, 2), draw.randint(-2, 2)), axis=(0, 1))
    else:
        noise = np.array(draw.choices((0, 1), k=height * width * channels))
        shape = (height, width) if channels == 1 else (height, width, channels)
        strength = strength_of(noise.reshape(shape), served.levels)
    return without(Drawing(strength, np.full((height, width), TOUCHED)), "lower")


def body_of(dataset: str, served: ServedModel, num_samples: int, seed: int, drawing: int = 0) -> bytes:
    """Return a request for completions of an image whose upper half is known, of another for each `drawing`."""
    half = drawing_of(dataset, served, random.Random(drawing))
    image, observed = levels_of(half, served.levels), known_cells(half, "mask", served.levels)
    values = {"dataset": dataset, "image": image.tolist(), "observed": observed.tolist()}
    return json.dumps({**values, "num_samples": num_samples, "seed": seed}).encode()


def percentiles_ms(seconds: list[float], *wanted: int) -> list[float]:
    """Return percentiles of seconds in milliseconds; NaN where there are none."""
    return [1000 * value for value in np.percentile(seconds or [math.nan], wanted)]


def time_of(ask: Callable[[bytes], object], bodies: list[bytes]) -> list[float]:
    """Return the seconds of each request."""
    return [timeit.timeit(functools.partial(ask, body), setup=gc.enable, number=1) for body in bodies]


def first_rows(http: httpx.Client, body: bytes) -> None:
    """Ask for a stream and leave after the first rows."""
    with http.stream("POST", "/complete_stream", content=body) as response:
        response.raise_for_status()
        next(line for line in response.iter_lines() if line == "event: rows")


def crowd(url: str, headers: dict[str, str], bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Let many clients ask for one completion after the other; return what came of it.

    They share this machine with the service, so each is the leanest there is. They come within a second that does not
    count, and who is refused comes back when told, give or take a second: one process cannot do 128 things at once, and
    would measure itself.
    """
    answered: list[float] = []
    refused: list[float] = []
    others: list[str] = []
    begin = time.perf_counter() + 1
    end = begin + seconds

    def ask(number: int) -> None:
        address = httpx.URL(url)
        connect = {"http": HTTPConnection, "https": HTTPSConnection}[address.scheme]
        time.sleep(random.random())
        named = {**headers, "X-Client": str(number)}
        with contextlib.closing(connect(address.host, address.port, timeout=TIMEOUT_S)) as connection:
            i = number
            while (start := time.perf_counter()) < end:
                connection.request("POST", "/complete", bodies[i % len(bodies)], named)
                response = connection.getresponse()
                text = response.read()
                taken = time.perf_counter() - start
                if response.status not in (HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS):
                    others.append(text.decode())
                elif start >= begin:
                    (answered if response.status == HTTPStatus.OK else refused).append(taken)
                if response.status == HTTPStatus.TOO_MANY_REQUESTS:
                    connection.close()  # a server does not hold one open for so long
                    # As a client does that reads the answer.
                    told = float(response.headers["retry-after"]) + random.random()
                    time.sleep(max(0.0, min(told, end - time.perf_counter())))
                i += clients

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    took = time.perf_counter() - begin
    return {"per_s": len(answered) / took, "answered": answered, "refused": refused, "others": others}


def parts_of_a_stroke(drawing: Drawing, num_levels: int) -> Iterator[tuple[Image, list[list[int]]]]:
    """Yield image and `observed` of a canvas after each quarter of a stroke that draws its ink, from the top."""
    image, ink = levels_of(drawing, num_levels), known_cells(drawing, "ink", num_levels)
    order = ink.cumsum().reshape(ink.shape)
    for part in range(1, 5):
        drawn = ink * (order <= part * ink.sum() / 4)
        yield (image * per_cell(drawn, image)).tolist(), drawn.tolist()


def visits(
    url: str, dataset: str, served: ServedModel, num: int, strokes: int
) -> tuple[list[float], list[float], list[str]]:
    """Do what canvases do at once.

    Returned are the seconds from each stroke's end to its endings, and to their probabilities, infinite where the next
    stroke came before; and what went wrong.
    """
    shared, drawn, scored, lost = ServiceClient(url), [], [], []

    def visit(number: int) -> None:
        client, draw = shared.named(f"canvas {number}"), random.Random(number)
        time.sleep(draw.uniform(0, LOOK_S))
        for stroke in range(strokes):
            look_s = draw.uniform(0.5, 1.5) * LOOK_S

            def ask(
                part: tuple[Image, list[list[int]]], end_s: float, seed: int = stroke, look_s: float = look_s
            ) -> tuple[float, float]:
                """Wait for endings until a time, then leave, as the canvas does; return when they and their
                probabilities came."""
                asked = functools.partial(client.complete_stream, dataset, *part, num_samples=NUM_ENDINGS)
                answers, drawn_at = in_background(lambda on_open: asked(on_open, seed=seed)), math.inf
                with contextlib.closing(answers):
                    for event in answers:
                        now = time.perf_counter()
                        if isinstance(event, Completions):
                            return drawn_at, now
                        if isinstance(event, Rows) and event.start + len(event.rows[0]) == len(part[0]):
                            drawn_at, end_s = now, min(end_s, now + look_s)
                        if now > end_s:
                            break
                return drawn_at, math.inf

            try:
                *parts, whole = parts_of_a_stroke(drawing_of(dataset, served, draw), served.levels)
                for part in parts:
                    end = time.perf_counter() + PART_S
                    ask(part, end)
                    time.sleep(max(0.0, end - time.perf_counter()))
                start = time.perf_counter()
                drawn_at, scored_at = ask(whole, start + TIMEOUT_S)
                drawn.append(drawn_at - start)
                scored.append(scored_at - start)
                time.sleep(max(0.0, drawn_at + look_s - time.perf_counter()))
            except ServiceError as error:
                lost.append(str(error))

    with ThreadPoolExecutor(num) as pool:
        list(pool.map(visit, range(num)))
    return drawn, scored, lost


def main(
    url: Annotated[str | None, Option(help="of the service; that of the environment if left out")] = None,
    requests: Annotated[int, Option(help="per dataset and row of the first table")] = 30,
    datasets: Annotated[list[str] | None, Option(help="all that are served by default; one each")] = None,
    clients: Annotated[list[int], Option(help="of a row of the second table; one each")] = [1, 8, 32, 128],  # noqa: B006
    seconds: Annotated[float, Option(help="per row of the second table")] = 10,
    dataset: Annotated[str, Option(help="of the second table, and of canvases")] = "",
    same_drawing: Annotated[bool, Option("--same-drawing", help="by all clients of the second table")] = False,
    canvases: Annotated[int, Option(help="time so many canvases at once, nothing else")] = 0,
    strokes: Annotated[int, Option(help="of each canvas")] = 20,
) -> None:
    """Print the tables, or what canvases see."""
    try:
        url = url or service_url()
        served = ServiceClient(url).models()
    except ServiceError as error:
        raise SystemExit(f"error: {error}") from None
    if not served:
        raise SystemExit("error: no dataset is served. Promote a model first.")
    dataset = dataset or ("mnist" if "mnist" in served else min(served))
    if unknown := {dataset, *(datasets or [])} - set(served):
        raise SystemExit(f"error: dataset {min(unknown)!r} is not served. Name one that is: {', '.join(served)}.")
    if canvases:
        drawn, scored, lost = visits(url, dataset, served[dataset], canvases, strokes)
        print(f"{canvases} canvases, {dataset}: {len(drawn)} of {canvases * strokes} came; lost: {lost[:1] or 'none'}")
        p50, p95 = percentiles_ms(drawn, 50, 95)
        print(f"nine endings: p50 {p50:.0f} ms, p95 {p95:.0f} ms")
        before, p50 = sum(map(math.isfinite, scored)), 1000 * median(scored or [math.nan])
        print(f"how probable each is: {before} before the next stroke, p50 of all {p50:.0f} ms")
        return
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False) as http:
        print(f"| dataset | /complete, {NUM_CANDIDATES} candidates of a half: p50 | p99 | first rows: p50 | p99 |")
        print("| --- | --- | --- | --- | --- |")
        for name in datasets or served:
            asked = [body_of(name, served[name], NUM_CANDIDATES, i, i) for i in range(max(requests, 1))]

            def complete(body: bytes) -> None:
                http.post("/complete", content=body).raise_for_status()

            complete(asked[0])
            whole = time_of(complete, asked[:requests])
            rows = time_of(lambda body: first_rows(http, body), asked[:requests])
            cells = [f"{value:.0f} ms" for value in (*percentiles_ms(whole, 50, 99), *percentiles_ms(rows, 50, 99))]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n| clients, {dataset} | answers per second | against 1 | p50 | p99 | refused | refusal: p99 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    alone = None
    bodies = [body_of(dataset, served[dataset], 1, i, 0 if same_drawing else i) for i in range(NUM_BODIES)]
    for num in clients:
        found = crowd(url, headers, bodies, num, seconds)
        if found["others"]:
            raise SystemExit(f"error: {len(found['others'])} requests failed, the first with: {found['others'][0]}")
        alone = alone or found["per_s"] or math.nan
        p50, p99 = percentiles_ms(found["answered"], 50, 99)
        refusal = f"{percentiles_ms(found['refused'], 99)[0]:.0f} ms" if found["refused"] else ""
        print(
            f"| {num} | {found['per_s']:.1f} | {found['per_s'] / alone:.2f} x | {p50:.0f} ms | {p99:.0f} ms | "
            f"{len(found['refused'])} | {refusal} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
