"""The canvas: draw, send to the service, show how the drawing could go on.

Run with `streamlit run app/canvas.py`. It knows the service's wire alone (`app.client`): no model, no likelihood here.
The grid itself is the component in `app/grid/`, which keeps the drawing in the browser.
"""

import contextlib
import html
import math
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.client import Completions, Rows, ServedModel, ServiceClient, ServiceError, service_url
from app.drawing import (
    ADDED_INK,
    INK,
    TOUCHED,
    Drawing,
    Ending,
    Request,
    as_png,
    data_url,
    decode_drawing,
    drawing_text,
    encode_drawing,
    ending_pixels,
    endings_html,
    fit_picture,
    gallery_html,
    known_cells,
    levels_of,
    order_of,
    parse_drawing,
    parse_seed,
    record,
    sheet,
)
from app.pages import (
    MAX_UPLOAD_MB,
    PICTURES,
    busy,
    choose_dataset,
    choose_label,
    choose_temperature,
    generate_page,
    in_background,
    models_page,
    shape_of,
    show_seed,
    surprise_page,
)

HERE = Path(__file__).parent
MODELS_TTL_S = 5.0  # how long the list of served models is taken as current
SHOW_S = 0.06  # at most this often are unfinished endings shown anew
NUM_ENDINGS = 9
GALLERY = 12  # past requests of a visit that are kept
PAGES = ["Draw", "Generate", "Surprise", "Models"]
KNOWN_MODES = {
    "above": "All above",
    "ink": "Only my ink",
    "touched": "All I touched",
    "mask": "Free mask",
}
KNOWN_HELP = {
    "above": "The model works from top to bottom: each row down to your lowest ink is kept as it is, blanks too. "
    "It fills in the hatched rows.",
    "ink": "Your ink is kept; the model may fill in any other cell. It works from top to bottom and cannot look ahead "
    "to ink further down, so these endings can be wilder.",
    "touched": "Your ink is kept, and what you brush with Blank stays empty. The model fills in the hatched cells.",
    "mask": "All is kept, blanks too, but what you brush with Hole. The model fills in the holes.",
}
ORDERS = {"likely": "Likely first", "rare": "Rare first", "drawn": "As drawn"}
KEYS = """
| key | does |
| --- | --- |
| `P` `E` `B` `H` | pen, eraser, known blank, hole |
| `1` `2` `3` | brush width in cells |
| `Ctrl+Z`, `Ctrl+Shift+Z` | undo, redo |
| `Delete` | clear; undo brings it back |
| `F` | complete |
| `Tab`, `Enter` | reach an ending, continue from it |
"""

# A visit's state, beside the grid's ink, which is the component's.
START = {
    "models": {},  # what the service last said that it serves
    "models_at": -math.inf,  # when it was asked
    "models_trouble": "",  # what went wrong then
    "pending": False,  # Complete was pressed and has no answer yet
    "ending": None,  # the last endings
    "answered": None,  # the last request that has an answer, be it an error
    "asked": None,  # the last request that was sent
    "trouble": "",  # what went wrong with it
    "gallery": [],  # earlier endings of this visit, the last first
    "grid": "",  # what is on the grid, as its text; for when another page is shown
    "load": None,  # what the grid is to take over: {revision, ink}
    "link_seed": None,  # the seed of the address that the visit began with, until it is used
    "generate_wanted": False,
    "generated": None,  # (request, served model, answer) of the last sheet
    "surprise": None,  # (question, answer, answers by label)
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


def forget_models() -> None:
    """Ask anew what is served."""
    st.session_state.models_at = -math.inf


def press() -> None:
    """Note that endings are wanted. They still are if a new stroke interrupts the page before they have come."""
    st.session_state.pending = True
    forget_models()


def stop() -> None:
    """Want no endings after all; nor again for the same drawing as long as it is only live."""
    st.session_state.pending = False
    st.session_state.answered = st.session_state.asked


def begin_visit() -> None:
    """Take up the address: with a seed, it is the link to a picture, which is drawn at once."""
    state = st.session_state
    if "models" in state:
        return
    for name, value in START.items():
        state[name] = list(value) if isinstance(value, list) else value
    try:
        state.link_seed = parse_seed(st.query_params.get("seed", ""))
    except ValueError:
        state.link_seed = None
    if state.link_seed is not None:
        state.generate_wanted = st.query_params.get("page") == "Generate"
        state.pending = not state.generate_wanted and bool(st.query_params.get("d"))


def drawing_grid(shape: tuple[int, int], mode: str, levels: int, live: bool) -> Drawing:
    """Show the grid; return what is on it.

    The key holds the shape alone: a drawing outlives a change of dataset, and a service that comes and goes.
    """
    component = st.components.v2.component(
        "drawing_grid",
        html=(HERE / "grid" / "grid.html").read_text(),
        css=(HERE / "grid" / "grid.css").read_text(),
        js=(HERE / "grid" / "grid.js").read_text(),
    )
    height, width = shape
    state = st.session_state
    size = 3 * height * width
    given = state.grid if len(state.grid) == size else drawing_text(decode_drawing(st.query_params.get("d", ""), shape))
    result = component(
        key=f"grid-{height}x{width}",
        data={
            "height": height,
            "width": width,
            "levels": levels,
            "known": mode,
            "live": live,
            "ink": given,
            "load": state.load if state.load and len(state.load["ink"]) == size else None,
        },
        default={"ink": given},
        on_ink_change=lambda: None,
    )
    state.grid = result.ink if isinstance(result.ink, str) else ""
    return parse_drawing(state.grid, shape)


def receive(client: ServiceClient, request: Request, levels: int, place: Any, coloured: bool) -> Ending:
    """Send a request, show rows as they come, return the finished endings. Raises ServiceError."""
    known = np.array(request.observed)
    blank = np.where(known == 1, np.array(request.image), -1)
    images = np.repeat(blank[None], request.num_samples, axis=0)  # (N, H, W)
    shown_at = -math.inf
    answers = in_background(client.complete_stream(**vars(request)))
    # Streamlit leaves this block by an exception when the page is to be redrawn: closing then ends the request.
    with busy("The model is drawing\N{HORIZONTAL ELLIPSIS}", stop) as beat, contextlib.closing(answers):
        for event in answers:
            if isinstance(event, Completions):
                return Ending(request, levels, np.array(event.completions), event.log_probs, event.seed, event.model)
            if isinstance(event, Rows):
                rows: np.ndarray = np.array(event.rows)  # (N, rows, W)
                images[:, event.start : event.start + rows.shape[1]] = rows
                if time.monotonic() - shown_at < SHOW_S:
                    continue
                place.html(endings_html(Ending(request, levels, images), coloured))
                shown_at = time.monotonic()
            else:
                beat()
    raise AssertionError("the stream ends with the completions or an error")


def show_ending(place: Any, note: Any, ending: Ending | None, coloured: bool, order: str, drawing: Drawing) -> None:
    """Show the last endings, or what to do to get some."""
    if ending is None:
        place.html('<div class="endings waiting"><p>Endings appear here, each with its exact probability.</p></div>')
        return
    place.html(endings_html(ending, coloured, order, drawing))
    legend = ""
    if coloured:
        legend = f'<span><i style="background: rgb{INK}"></i>yours</span>'
        legend += f'<span><i style="background: rgb{ADDED_INK}"></i>added by the model</span>'
    model = ending.model or {}
    by = html.escape(f"{model.get('name')} version {model.get('version')}")
    hint = "Click an ending to continue from it."
    with note.container():
        st.html(f'<p class="legend">{legend}<span>by {by}</span><span>{hint}</span></p>')
        show_seed(ending.seed)


def downloads(ending: Ending, coloured: bool, order: str) -> None:
    """Offer the endings as a large picture, and as JSON that reproduces them."""
    known = np.array(ending.request.observed)

    def picture() -> bytes:
        images = [ending.images[i] for i in order_of(ending, order)]
        return sheet([ending_pixels(image, known, ending.levels, coloured) for image in images], 3)

    name = f"{ending.request.dataset}-{ending.seed}"
    look: dict[str, Any] = {"icon": ":material/download:", "on_click": "ignore"}
    st.download_button("PNG", picture, f"{name}.png", "image/png", key="png", **look)
    st.download_button("JSON", lambda: record(ending), f"{name}.json", "application/json", key="json", **look)


def upload(shape: tuple[int, int]) -> None:
    """Let a picture take the place of the drawing, after showing what is left of it on the grid."""
    with st.expander("Start from a picture"):
        file = st.file_uploader("PNG or JPEG", type=PICTURES, max_upload_size=MAX_UPLOAD_MB)
        dark_ink = st.toggle("Dark ink on light paper", value=True)
        if file is None:
            return
        try:
            strength = fit_picture(file.getvalue(), shape, 1, dark_ink)
        except ValueError as error:
            st.warning(str(error))
            return
        drawing = Drawing(strength, np.full(shape, TOUCHED))
        with st.container(horizontal=True, vertical_alignment="center"):
            small = as_png(ending_pixels(strength, np.ones(shape), 256, coloured=False))
            st.html(f'<img class="small" src="{data_url(small)}" alt="The picture, resized">')
            st.caption(f"This is what {shape[0]} x {shape[1]} cells keep of it.", width="stretch")

            def put() -> None:
                st.session_state.load = {"revision": uuid.uuid4().hex, "ink": drawing_text(drawing)}

            st.button("Put it on the grid", on_click=put)
        st.caption("Then brush a hole (H) into it, and the model fills it in.")


def what_is_missing(models: dict[str, ServedModel], trouble: str) -> str:
    """Say why no dataset can be drawn."""
    if models:
        return f"This page draws in one colour; only {', '.join(models)} is served. Promote a grey one."
    return trouble or "No model is promoted yet. Run `make pipeline`, then press Complete again."


def main() -> None:
    """Show the page."""
    st.set_page_config(page_title="PixelCNN canvas", page_icon="\N{PENCIL}\N{VARIATION SELECTOR-16}", layout="wide")
    st.html(HERE / "page.css")
    begin_visit()
    state = st.session_state
    try:
        client = client_of(service_url())
    except ServiceError as error:
        st.error(str(error))
        st.stop()
    refresh_models(client)
    page = st.segmented_control(
        "Page", PAGES, key="page", default="Draw", required=True, bind="query-params", label_visibility="collapsed"
    )
    if page == "Draw":
        draw_page(client, drawable(state.models))
    elif not state.models:
        st.warning(what_is_missing({}, state.models_trouble))
        st.button("Try again", on_click=forget_models)
    elif page == "Generate":
        generate_page(client, state.models)
    elif page == "Surprise":
        surprise_page(client, state.models, state.grid)
    else:
        models_page(state.models)


def draw_page(client: ServiceClient, served: dict[str, ServedModel]) -> None:
    """Draw; endings appear."""
    state = st.session_state
    st.title("Draw the beginning. PixelCNN finishes it.", anchor=False)
    st.markdown("Start a digit from the top and press **Complete**: the model shows nine ways it could go on.")
    # In the order of a phone: grid, button, endings, settings. The grid is filled last, for it needs the settings.
    left, right = st.columns(2, gap="medium")
    with left:
        mode = st.segmented_control(
            "What the model must keep",
            list(KNOWN_MODES),
            format_func=lambda name: KNOWN_MODES[name],
            default="above",
            required=True,
            label_visibility="collapsed",
            width="stretch",
            wrap=True,
            key="known",
            bind="query-params",
        )
        grid_place = st.container()
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button(
                "Complete",
                type="primary",
                icon=":material/auto_awesome:",
                on_click=press,
                width="stretch",
                shortcut="F",
            ):
                state.pending = True  # a visit that goes on after a restart of this program has no callback yet
            live = st.toggle("As I draw", key="live", persist_state="session")
        st.caption(KNOWN_HELP[mode])
    with right:
        status, place, note = st.empty(), st.empty(), st.empty()
        actions = st.container(horizontal=True, vertical_alignment="center")
    left, right = st.columns(2, gap="medium")
    with left:
        upload_place = st.container()
        with st.expander("Keys"):
            st.markdown(KEYS)
    with right:
        first, second = st.columns(2)
        with first:
            dataset = choose_dataset(served)
            temperature = choose_temperature()
        model = served.get(dataset)
        with second:
            label = choose_label(model.labels if model else [], "Finish it as")
            num_samples = st.slider("Endings", 1, 16, NUM_ENDINGS, key="n", bind="query-params")
        typed = st.text_input("Seed", placeholder="a new one each time", key="typed_seed")
        coloured = st.toggle("Colour what the model added", value=True, key="coloured", persist_state="session")
    shape = shape_of(model) if model else (28, 28)
    levels = model.levels if model else 2
    with upload_place:
        upload(shape)
    with grid_place:
        drawing = drawing_grid(shape, mode, levels, live)
    known = known_cells(drawing, mode, levels)
    image = levels_of(drawing, levels) * known
    with actions:
        order = "likely"
        if state.ending:
            order = st.segmented_control(
                "Order",
                list(ORDERS),
                format_func=lambda name: ORDERS[name],
                default="likely",
                required=True,
                label_visibility="collapsed",
                key="order",
                persist_state="session",
            )
            downloads(state.ending, coloured, order)
    show_ending(place, note, state.ending, coloured, order, drawing)
    if state.gallery:
        st.caption("This visit: the likeliest ending each time")
        st.html(gallery_html(state.gallery))
    if model:
        st.caption(f"Serving {model_line(model)}")

    try:
        seed = parse_seed(typed)
    except ValueError as error:
        status.warning(str(error))
        return
    if model is None:
        state.pending = False
        status.warning(what_is_missing(state.models, state.models_trouble))
        return
    chosen = state.ending is not None and any(np.array_equal(image, ending) for ending in state.ending.images)
    wanted = state.pending or (live and drawing.mark.any() and not chosen)
    if wanted and known.all():
        state.pending = False
        status.warning("Nothing is left to fill in. Erase below, brush a hole (H), or keep only your ink.")
        return
    request = Request(
        dataset=dataset,
        image=image.tolist(),
        observed=known.tolist(),
        num_samples=num_samples,
        label=label,
        temperature=temperature,
        seed=state.link_seed if seed is None else seed,
    )
    if state.pending or (wanted and request != state.answered):
        state.trouble, state.asked = "", request
        try:
            with status:
                ending = receive(client, request, levels, place, coloured)
        except ServiceError as error:
            state.trouble = str(error)
        else:
            keep(ending, drawing)
            place.html(endings_html(ending, coloured, order, drawing))
        state.pending, state.answered = False, request
        st.rerun()
    trouble = state.trouble or state.models_trouble
    if trouble:
        status.warning(trouble)


def keep(ending: Ending, drawing: Drawing) -> None:
    """Take the finished endings as the last ones, and make the page's address their link."""
    state = st.session_state
    state.ending, state.link_seed = ending, None
    state.gallery = [ending, *state.gallery][:GALLERY]
    st.query_params.update({"d": encode_drawing(drawing), "seed": str(ending.seed)})


main()
