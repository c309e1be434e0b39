"""The pages beside the drawing one: generate, surprise, models; and how any page waits for an answer."""

import contextlib
import html
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from app.client import Completions, Rows, ServedModel, ServiceClient, ServiceError
from app.drawing import (
    TOUCHED,
    Drawing,
    as_png,
    bits_per_dim,
    data_url,
    fit_picture,
    heat_pixels,
    levels_of,
    nats,
    parse_drawing,
    parse_seed,
    sheet,
    sheet_html,
    whole_pixels,
)

Event = TypeVar("Event")
WAIT_S = 0.03  # how often a page that waits looks whether it is to be redrawn
SHOW_S = 0.06  # at most this often are unfinished images shown anew
DRAWING = "The model is drawing\N{HORIZONTAL ELLIPSIS}"
NUM_GENERATED = 16
PICTURES = ["png", "jpg", "jpeg"]
MAX_UPLOAD_MB = 10

# Test figures of the papers, to stand beside ours. The protocol belongs to each.
PAPERS = {
    "mnist": "PixelRNN paper (arXiv:1601.06759): PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 nats; protocol "
    "static, so not the same task as dynamic.",
    "mnist5k": "No paper uses these 5,000 digits. The PixelRNN paper's PixelCNN has 81.30 nats on all of MNIST, with "
    "55,000 digits to learn from; protocol static.",
    "fashion_mnist": "No autoregressive figure is published. Glow has 2.958 bits/dim; protocol 8-bit.",
    "cifar10": "PixelCNN 3.14, PixelRNN 3.00 (arXiv:1601.06759), Gated PixelCNN 3.03 (arXiv:1606.05328) bits/dim; "
    "protocol 8-bit.",
}


def in_background(events: Iterator[Event]) -> Generator[Event | None, None, None]:
    """Yield the events of another thread, and None whenever nothing has come for a moment.

    A page is redrawn, or stopped, when it next shows something: showing it at each None keeps it responsive while a
    service is slow. Leaving the generator drops what still comes. Raises what the events raise.
    """
    answers: queue.Queue[tuple[bool, Any]] = queue.Queue()
    left = threading.Event()

    def ask() -> None:
        try:
            for event in events:
                answers.put((True, event))
                if left.is_set():
                    break
        except Exception as error:  # it is raised where it is awaited
            answers.put((False, error))
        finally:
            if isinstance(events, Generator):
                events.close()  # ends the request
            answers.put((False, None))

    threading.Thread(target=ask, daemon=True).start()
    try:
        while True:
            try:
                good, event = answers.get(timeout=WAIT_S)
            except queue.Empty:
                yield None
                continue
            if good:
                yield event
            elif event is None:
                return
            else:
                raise event
    finally:
        left.set()


@contextlib.contextmanager
def busy(text: str, on_stop: Callable[[], None]) -> Iterator[Callable[[], Any]]:
    """Show that the model works, and a button that stops it, both unseen in the first moment; yield a heartbeat."""
    place = st.empty()
    with place.container(key="busy", horizontal=True, vertical_alignment="center"):
        beat = st.empty()
        beat.markdown(text)
        st.button("Stop", on_click=on_stop, key="stop", width="content")
    try:
        yield lambda: beat.markdown(text)
    finally:
        place.empty()


def wait_for(call: Callable[[], Event], text: str, on_stop: Callable[[], None]) -> Event:
    """Return what a call of the service returns, showing that it takes a while. Raises ServiceError."""
    with busy(text, on_stop) as beat:
        for answer in in_background(call() for _ in range(1)):
            if answer is not None:
                return answer
            beat()
    raise AssertionError("a call returns or raises")


def receive(
    client: ServiceClient,
    request: dict[str, Any],
    images: np.ndarray,
    on_stop: Callable[[], None],
    show: Callable[[], Any],
) -> Completions:
    """Send a request for completions; return them once they are finished. Raises ServiceError.

    Args:
        images: (N, H, W) or (N, H, W, 3) levels, into which rows are written as they come.
        show: called when `images` has new rows.
    """
    shown_at = beat_at = -math.inf
    answers = in_background(client.complete_stream(**request))
    # Streamlit leaves this block by an exception when the page is to be redrawn: closing then ends the request.
    with busy(DRAWING, on_stop) as beat, contextlib.closing(answers):
        for event in answers:
            if isinstance(event, Completions):
                return event
            if isinstance(event, Rows):
                rows: np.ndarray = np.array(event.rows)  # (N, rows, W) or (N, rows, W, 3)
                images[:, event.start : event.start + rows.shape[1]] = rows
                now = time.monotonic()
                if now - shown_at >= SHOW_S:
                    show()
                    shown_at = beat_at = now
                elif now - beat_at >= WAIT_S:
                    beat()
                    beat_at = now
            else:
                beat()
    raise AssertionError("the stream ends with the completions or an error")


def choose_dataset(served: dict[str, ServedModel]) -> str:
    """Show the datasets; return the chosen one, empty text if there is none."""
    if not served:  # under a key of its own, or the address would lose its dataset while the service is away
        st.selectbox("Dataset", [], key="no_dataset", placeholder="none yet")
        return ""
    return st.selectbox("Dataset", list(served), key="dataset", bind="query-params", placeholder="none yet")


def choose_label(names: list[str], text: str) -> int | None:
    """Show the labels; return the chosen one's index, None for none."""
    if not names:
        st.selectbox(text, ["anything"], key="no_label", disabled=True)
        return None
    label: int = st.selectbox(
        text,
        [-1, *range(len(names))],
        format_func=lambda index: "anything" if index < 0 else names[index],
        key="label",
        bind="query-params",
    )
    return None if label < 0 else label


def choose_temperature() -> float:
    """Show the temperature; return it."""
    return st.slider(
        "Temperature",
        0.0,
        1.5,
        1.0,
        0.05,
        key="temperature",
        bind="query-params",
        help="1 is the model itself; less is tamer; 0: the likeliest cell.",
    )


def shape_of(model: ServedModel) -> tuple[int, ...]:
    """Return the shape of an image on the wire: (H, W), or (H, W, 3) for colour."""
    channels, height, width = model.shape
    return (height, width) if channels == 1 else (height, width, channels)


def show_seed(seed: int | None) -> None:
    """Show a seed with a button to copy it."""
    with st.container(key="seed", horizontal=True, vertical_alignment="center"):
        st.caption("Seed", width="content")
        st.code(str(seed), language=None, width="content")
        st.caption("The address of this page reproduces it.", width="content")


def generate_page(client: ServiceClient, served: dict[str, ServedModel]) -> None:
    """Whole images from nothing: a sheet of 16."""
    state = st.session_state
    st.title("What the model dreams of", anchor=False)
    st.markdown("Whole images, drawn from nothing, each with its exact log-probability.")
    left, right = st.columns([9, 21], gap="medium")
    with left:
        dataset = choose_dataset(served)
        model = served[dataset]
        label = choose_label(model.labels, "Draw")
        temperature = choose_temperature()
        typed = st.text_input("Seed", placeholder="a new one each time", key="generate_seed")
        if st.button("Generate", type="primary", icon=":material/auto_awesome:", width="stretch", shortcut="F"):
            state.generate_wanted = True
    with right:
        trouble, place = st.empty(), st.empty()
    try:
        seed = parse_seed(typed)
    except ValueError as error:
        trouble.warning(str(error))
        return
    if state.generate_wanted:
        request: dict[str, Any] = {
            "dataset": dataset,
            "num_samples": NUM_GENERATED,
            "label": label,
            "temperature": temperature,
            "seed": state.link_seed if seed is None else seed,
        }

        def stop() -> None:
            state.generate_wanted = False

        # An image of which nothing is known: its completion is what /generate draws, and comes row by row.
        nothing = np.zeros(shape_of(model), dtype=np.int64)
        unknown = {"image": nothing.tolist(), "observed": nothing.reshape(*nothing.shape[:2], -1)[..., 0].tolist()}
        images = np.full((NUM_GENERATED, *nothing.shape), -1)

        def show() -> None:
            place.html(sheet_html([whole_pixels(image, model.levels) for image in images], None))

        try:
            answer = receive(client, request | unknown, images, stop, show)
        except ServiceError as error:
            trouble.warning(str(error))
        else:
            state.generated = (request | {"seed": answer.seed}, model, answer)
            st.query_params["seed"] = str(answer.seed)
            state.link_seed = None
        state.generate_wanted = False
    if not state.generated:
        place.html('<div class="endings waiting"><p>Sixteen images appear here.</p></div>')
        return
    request, model, answer = state.generated
    # The likeliest first.
    order = sorted(range(len(answer.completions)), key=answer.log_probs.__getitem__, reverse=True)
    pictures = [whole_pixels(np.array(answer.completions[i]), model.levels) for i in order]
    place.html(sheet_html(pictures, [nats(answer.log_probs[i]) for i in order]))
    with right:
        show_seed(answer.seed)
        with st.container(horizontal=True, vertical_alignment="center"):
            by = answer.model
            st.caption(f"by {by.get('name')} version {by.get('version')}, likeliest first", width="stretch")
            values = {
                "request": request,
                "result": {"images": answer.completions, "log_probs": answer.log_probs},
                "model": by,
            }
            name = f"{request['dataset']}-{answer.seed}"
            st.download_button(
                "PNG",
                lambda: sheet(pictures, 4),
                f"{name}.png",
                "image/png",
                on_click="ignore",
                icon=":material/download:",
            )
            st.download_button(
                "JSON",
                json.dumps(values),
                f"{name}.json",
                "application/json",
                on_click="ignore",
                icon=":material/download:",
            )


def surprise_page(client: ServiceClient, served: dict[str, ServedModel], drawn: dict[tuple[int, ...], str]) -> None:
    """Where an image surprises the model: nats per pixel.

    Args:
        drawn: what is on the grid of each shape, as its text.
    """
    state = st.session_state
    st.title("How surprised is the model?", anchor=False)
    st.markdown("Each pixel costs some nats given those before it. Their sum is the image's exact log-probability.")
    left, right = st.columns([9, 21], gap="medium")
    with left:
        dataset = choose_dataset(served)
        model = served[dataset]
        shape = shape_of(model)
        file = st.file_uploader("A picture, instead of your drawing", type=PICTURES, max_upload_size=MAX_UPLOAD_MB)
        dark_ink = len(shape) == 2 and st.toggle("Dark ink on light paper", value=True)
        label = choose_label(model.labels, "Told that it is")
    try:
        if file is not None:
            drawing = Drawing(fit_picture(file.getvalue(), shape, dark_ink), np.full(shape[:2], TOUCHED))
        else:
            drawing = parse_drawing(drawn.get(shape), shape)
        image = levels_of(drawing, model.levels)
    except ValueError as error:
        right.warning(str(error))
        return
    question = (dataset, image.tolist(), label)
    if not state.surprise or state.surprise[0] != question:
        try:
            state.surprise = (question, client.likelihood(dataset, image.tolist(), label=label), None)
        except ServiceError as error:
            right.warning(str(error))
            return
    _, answer, by_label = state.surprise
    surprise = np.array(answer.surprise)
    with right:
        pictures = [whole_pixels(image, model.levels), heat_pixels(surprise)]
        st.html(
            '<div class="pair">'
            f'<figure><img src="{data_url(as_png(pictures[0]))}" alt="The image, as it is sent">'
            "<figcaption>as it is sent</figcaption></figure>"
            f'<figure><img src="{data_url(as_png(pictures[1]))}" alt="Heat map of nats per pixel">'
            f'<figcaption><span>0</span><i class="heat"></i><span>{surprise.max():.1f} nats</span></figcaption>'
            "</figure>"
            "</div>"
        )
        if not drawing.mark.any():
            st.caption("Nothing is drawn yet: this is what an empty page costs. Draw on the first page, or upload.")
        first, second, third = st.columns(3)
        first.metric("log-probability", nats(answer.log_prob))
        second.metric("per dimension", bits_per_dim(answer.log_prob, image.size))
        usual = model.scores.get("test/nll_nats")
        if isinstance(usual, (int, float)):
            third.metric("a usual test image", nats(-usual))
        if model.labels and st.button("Which label explains it best?", icon=":material/label:"):

            def ask() -> list[float]:
                labels = range(len(model.labels))
                return [client.likelihood(dataset, image.tolist(), label=i).log_prob for i in labels]

            try:
                by_label = wait_for(ask, "Asking of each label\N{HORIZONTAL ELLIPSIS}", lambda: None)
            except ServiceError as error:
                st.warning(str(error))
            else:
                state.surprise = (question, answer, by_label)
        if by_label:
            st.html(labels_html(model.labels, by_label))
        st.caption(f"by {answer.model.get('name')} version {answer.model.get('version')}")


def labels_html(names: list[str], log_probs: list[float]) -> str:
    """Return what each label makes of an image: its log-probability, and the label's share if all are as likely."""
    scores = np.array(log_probs)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    rows = [
        f"<tr><th>{html.escape(names[i])}</th><td>{nats(scores[i])}</td>"
        f'<td><i style="width: {100 * shares[i]:.1f}%"></i></td><td>{100 * shares[i]:.0f} %</td></tr>'
        for i in np.argsort(-scores)
    ]
    return f'<table class="labels">{"".join(rows)}</table>'


def models_page(served: dict[str, ServedModel]) -> None:
    """What serves, how good it is, and where it comes from."""
    st.title("What is served", anchor=False)
    st.markdown("One champion per dataset. A better version takes its place without a restart.")
    for dataset, model in served.items():
        unit = "test/nll_nats" if model.levels == 2 else "test/bits_per_dim"
        with st.container(border=True):
            st.subheader(f"{model.model.get('name', dataset)} version {model.model.get('version')}", anchor=False)
            channels, height, width = model.shape
            colour = " x 3" if channels == 3 else ""
            st.markdown(
                f"{model.architecture} · {height} x {width}{colour}, {model.levels} levels · protocol: {model.protocol}"
            )
            scores = {name: value for name, value in model.scores.items() if isinstance(value, (int, float))}
            if unit in scores:
                figure = f"{scores[unit]:.2f} nats" if model.levels == 2 else f"{scores[unit]:.3f} bits/dim"
                st.metric(f"test NLL ({model.protocol})", figure)
            if dataset in PAPERS:
                st.caption(f"Beside it: {PAPERS[dataset]}")
            lineage = {
                "data hash": model.model.get("data_hash"),
                "git commit": model.model.get("git_commit"),
                "MLflow run": model.model.get("run_id"),
                "weights sha256": model.model.get("weights_sha256"),
                "promoted": model.promoted_at,
            }
            st.html(facts_html({name: str(value) for name, value in lineage.items() if value}))
            with st.expander("All scores"):
                st.html(facts_html({name: f"{value:,.4g}" for name, value in sorted(scores.items())}))


def facts_html(facts: dict[str, str]) -> str:
    """Return names and values as a table."""
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts">{"".join(rows)}</table>'
