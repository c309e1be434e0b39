"""The canvas page: draw, send to the service, show how the drawing could go on.

Run with `streamlit run app/canvas.py`. It knows the service's wire alone (`app.client`): no model, no likelihood here.
The grid itself is the component in `app/grid/`, which keeps the ink in the browser.
"""

import contextlib
import html
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.client import Completions, ServedModel, ServiceClient, ServiceError, service_url
from app.drawing import ADDED_INK, INK, Ending, Request, endings_html, known_cells, parse_ink, parse_seed

HERE = Path(__file__).parent
MODELS_TTL_S = 5.0  # how long the list of served models is taken as current
KNOWN_MODES = {"above": "All above my lowest ink", "ink": "Only my ink"}
KNOWN_HELP = {
    "above": "The model works from top to bottom: each row down to your lowest ink is kept as it is, blanks too. "
    "It fills in the hatched rows.",
    "ink": "Your ink is kept; the model may fill in any other cell. It works from top to bottom and cannot look ahead "
    "to ink further down, so these endings can be wilder.",
}

# A visit's state, beside the grid's ink, which is the component's.
START = {
    "models": {},  # what the service last said that it serves
    "models_at": -math.inf,  # when it was asked
    "models_trouble": "",  # what went wrong then
    "pending": False,  # Complete was pressed and has no answer yet
    "ending": None,  # the last endings
    "answered": None,  # the last request that has an answer, be it an error
    "trouble": "",  # that error
}


def drawable(served: dict[str, ServedModel]) -> dict[str, ServedModel]:
    """Return the grey datasets, those of handwritten digits first: the grid has one kind of ink."""
    grey = {name: model for name, model in served.items() if model.shape[0] == 1}
    return dict(sorted(grey.items(), key=lambda item: not item[0].startswith("mnist")))


def model_line(served: ServedModel) -> str:
    """Say in one line which version serves and how good it is, with the protocol."""
    model, scores = served.model, served.scores
    parts = [f"**{model.get('name')}** version {model.get('version')}"]
    score, unit = scores.get("test/nll_nats"), "nats per image"
    if served.levels > 2:
        score, unit = scores.get("test/bits_per_dim"), "bits/dim"
    if isinstance(score, (int, float)):
        protocol = f"protocol: {served.protocol}"
        if "test/num_images" in scores:
            protocol += f", {scores['test/num_images']:.0f} test images"
        parts.append(f"test NLL {score:.2f} {unit} ({protocol})")
    if model.get("git_commit"):
        parts.append(f"commit {str(model['git_commit'])[:7]}")
    return " · ".join(parts)


@st.cache_resource
def client_of(url: str) -> ServiceClient:
    """Return one client per address, shared by all visits."""
    return ServiceClient(url)


def refresh_models(client: ServiceClient) -> None:
    """Ask what is served if the list is old; the last list stays in use while the service is away."""
    state = st.session_state
    if time.monotonic() - state.models_at < MODELS_TTL_S:
        return
    try:
        state.models = client.models()
        state.models_trouble = ""
    except ServiceError as error:
        state.models_trouble = str(error)
    state.models_at = time.monotonic()


def press() -> None:
    """Note that endings are wanted. They still are if a new stroke interrupts the page before they have come."""
    st.session_state.pending = True
    st.session_state.models_at = -math.inf


def drawing_grid(shape: tuple[int, int], mode: str) -> np.ndarray:
    """Show the grid; return its ink, (H, W) int64 of 0 and 1.

    The key holds the shape alone: a drawing outlives a change of dataset, and a service that comes and goes.
    """
    component = st.components.v2.component(
        "drawing_grid",
        html=(HERE / "grid" / "grid.html").read_text(),
        css=(HERE / "grid" / "grid.css").read_text(),
        js=(HERE / "grid" / "grid.js").read_text(),
    )
    height, width = shape
    state = component(
        key=f"grid-{height}x{width}",
        data={"height": height, "width": width, "known": mode},
        default={"ink": "0" * (height * width)},
        on_ink_change=lambda: None,
    )
    return parse_ink(state.ink, shape)


def receive(client: ServiceClient, request: Request, levels: int, place: Any, coloured: bool) -> Ending:
    """Send a request, show rows as they come, return the finished endings. Raises ServiceError."""
    known = np.array(request.observed)
    blank = np.where(known == 1, np.array(request.image), -1)
    images = np.repeat(blank[None], request.num_samples, axis=0)  # (N, H, W)
    # Streamlit leaves this loop by an exception when the page is to be redrawn: closing then ends the request.
    with contextlib.closing(client.complete_stream(**vars(request))) as events:
        for event in events:
            if isinstance(event, Completions):
                return Ending(request, levels, np.array(event.completions), event.log_probs, event.seed, event.model)
            rows: np.ndarray = np.array(event.rows)  # (N, rows, W)
            images[:, event.start : event.start + rows.shape[1]] = rows
            place.html(endings_html(Ending(request, levels, images), coloured))
    raise AssertionError("the stream ends with the completions or an error")


def show_ending(place: Any, note: Any, ending: Ending | None, coloured: bool) -> None:
    """Show the last endings, or what to do to get some."""
    if ending is None:
        place.html('<div class="endings waiting"><p>Endings appear here, each with its exact probability.</p></div>')
        return
    place.html(endings_html(ending, coloured))
    legend = ""
    if coloured:
        legend = f'<span><i style="background: rgb{INK}"></i>yours</span>'
        legend += f'<span><i style="background: rgb{ADDED_INK}"></i>added by the model</span>'
    model = ending.model or {}
    by = html.escape(f"{model.get('name')} version {model.get('version')}, seed {ending.seed}")
    likely = "Most likely first: log-probability of what was added, given what was kept."
    note.html(f'<p class="legend">{legend}<span>by {by}</span><span>{likely}</span></p>')


def settings(served: dict[str, ServedModel]) -> dict[str, Any]:
    """Show the settings; return them by name."""
    with st.expander("Settings"):
        dataset = st.selectbox("Dataset", list(served), placeholder="none yet")
        names = served[dataset].labels if dataset in served else []
        return {
            "dataset": dataset,
            "label": st.selectbox(
                "Finish it as",
                [None, *range(len(names))],
                format_func=lambda index: "anything" if index is None else names[index],
            ),
            "num_samples": st.slider("Endings", 1, 16, 6),
            "temperature": st.slider(
                "Temperature", 0.0, 1.5, 1.0, 0.05, help="1 is the model itself; less is tamer; 0: the likeliest cell."
            ),
            "seed": st.text_input("Seed", placeholder="a new one each time"),
            "coloured": st.toggle("Colour what the model added", value=True),
        }


def what_is_missing(models: dict[str, ServedModel], trouble: str) -> str:
    """Say why no dataset can be drawn."""
    if models:
        return f"This page draws in one colour; only {', '.join(models)} is served. Promote a grey one."
    return trouble or "No model is promoted yet. Run `make pipeline`, then press Complete again."


def main() -> None:
    """Show the page."""
    st.set_page_config(page_title="PixelCNN canvas", page_icon="\N{PENCIL}\N{VARIATION SELECTOR-16}", layout="wide")
    st.html(HERE / "page.css")
    state = st.session_state
    for name, value in START.items():
        state.setdefault(name, value)
    try:
        client = client_of(service_url())
    except ServiceError as error:
        st.error(str(error))
        st.stop()
    refresh_models(client)
    served = drawable(state.models)

    st.title("Draw the beginning. PixelCNN finishes it.", anchor=False)
    st.markdown("Start a digit from the top and press **Complete**: the model shows several ways it could go on.")
    left, right = st.columns([13, 17], gap="medium")
    # In the order of a phone: grid, button, endings, settings. The grid is filled last, for it needs the settings.
    with left:
        grid_place = st.container()
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Complete", type="primary", icon=":material/auto_awesome:", on_click=press, width="stretch"):
                state.pending = True  # a visit that goes on after a restart of this program has no callback yet
            live = st.toggle("As I draw")
    with right:
        status, place, note = st.empty(), st.empty(), st.empty()
        mode = st.segmented_control(
            "What the model must keep",
            list(KNOWN_MODES),
            format_func=lambda name: KNOWN_MODES[name],
            default="above",
            required=True,
            width="stretch",
        )
        st.caption(KNOWN_HELP[mode])
        chosen = settings(served)
    coloured = chosen.pop("coloured")
    model = served.get(chosen["dataset"])
    height, width = model.shape[1:] if model else (28, 28)
    with grid_place:
        ink = drawing_grid((height, width), mode)
    known = known_cells(ink, mode)
    show_ending(place, note, state.ending, coloured)
    if model:
        st.caption(f"Serving {model_line(model)}")

    wanted = state.pending or (live and ink.any())
    try:
        chosen["seed"] = parse_seed(chosen["seed"])
    except ValueError as error:
        status.warning(str(error))
        return
    if model is None:
        state.pending = False
        status.warning(what_is_missing(state.models, state.models_trouble))
        return
    if wanted and known.all():
        state.pending = False
        status.warning("Nothing is left to fill in: your ink reaches the last row. Erase some, or keep only your ink.")
        return
    request = Request(image=(ink * (model.levels - 1)).tolist(), observed=known.tolist(), **chosen)
    if state.pending or (wanted and request != state.answered):
        state.trouble = ""
        try:
            with status, st.spinner("The model is drawing\N{HORIZONTAL ELLIPSIS}"):
                state.ending = receive(client, request, model.levels, place, coloured)
        except ServiceError as error:
            state.trouble = str(error)
        state.pending = False
        state.answered = request
        show_ending(place, note, state.ending, coloured)
    trouble = state.trouble or state.models_trouble
    if trouble:
        status.warning(trouble)


main()
