"""The canvas: draw, send to the service, show how the drawing could go on.

Run with `streamlit run app/canvas.py`. It knows the service's wire alone (`app.client`): no model, no likelihood here.
The grid itself is the component in `app/grid/`, which keeps the drawing in the browser.
"""

import copy
import gc
import html
import math
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.client import ServedModel, ServiceClient, ServiceError, service_url
from app.drawing import (
    ADDED_INK,
    HOLE,
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
    per_cell,
    record,
    sheet,
    strength_of,
    text_size,
    whole_pixels,
    without,
)
from app.pages import (
    DRAWING,
    MAX_UPLOAD_MB,
    PICTURES,
    choose_dataset,
    choose_label,
    choose_temperature,
    generate_page,
    models_page,
    receive,
    shape_of,
    show_seed,
    surprise_page,
    wait_for,
)

HERE = Path(__file__).parent
MODELS_TTL_S = 5.0  # how long the list of served models is taken as current
NUM_ENDINGS = 9
GALLERY = 12  # past requests of a visit that are kept
COMPLETES = "test/completion_top_nats"  # a score that every model with a context network has
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
# In colour, where no cell is blank: painted black, or not painted.
PAINT_KNOWN_MODES = {"ink": "Only my paint", "above": "All above", "mask": "Free mask"}
PAINT_KNOWN_HELP = {
    "ink": "What you paint is kept, black too. The model fills in the hatched cells.",
    "above": "The model works from top to bottom: each row down to your lowest paint is kept, and black where you did "
    "not paint. It fills in the hatched rows.",
    "mask": "All is kept, and black where you did not paint, but what you brush with Hole. The model fills the holes.",
}
SOURCES = {"model": "The model makes one", "file": "A picture of mine"}
PARTS = {"": "None", "lower": "Lower", "upper": "Upper", "left": "Left", "right": "Right"}
ORDERS = {"likely": "Likely first", "rare": "Rare first", "drawn": "As drawn"}
KEYS = """
| key | does |
| --- | --- |
| `P` `E` `B` `H` | pen, eraser, known blank, hole |
| `1` `2` `3` `5` `8` | brush width in cells |
| `S` | soft edge of the pen, on or off |
| `C` | centre the drawing |
| `Ctrl+Z`, `Ctrl+Shift+Z` | undo, redo |
| `Delete` | clear; undo brings it back |
| arrows, `Space` | on the grid: go to a cell, draw there; with `Shift`, draw on the way |
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
    "drawn": {},  # what is on the grid of each shape, as its text; for when another page is shown
    "example_wanted": False,
    "example": None,  # (dataset, strengths) of the last picture that was made to start from
    "load": None,  # what the grid is to take over: {revision, ink}
    "link_seed": None,  # the seed of the address that the visit began with, until it is used
    "generate_wanted": False,
    "generated": None,  # (request, served model, answer) of the last sheet
    "surprise": None,  # (question, answer, answers by label)
}


def drawable(served: dict[str, ServedModel]) -> dict[str, ServedModel]:
    """Return what can be drawn in the order to offer it: handwritten digits first, images in colour last."""
    return dict(sorted(served.items(), key=lambda item: (item[1].shape[0], not item[0].startswith("mnist"))))


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


@st.cache_resource
def settle() -> None:
    """Take what the program has loaded out of the garbage collector's sight: Streamlit runs it after every redrawing,
    for 40 ms then, in which no stroke is heard."""
    gc.collect()
    gc.freeze()


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
        state[name] = copy.copy(value)
    try:
        state.link_seed = parse_seed(st.query_params.get("seed", ""))
    except ValueError:
        state.link_seed = None
    if state.link_seed is not None:
        state.generate_wanted = st.query_params.get("page") == "Generate"
        state.pending = not state.generate_wanted and bool(st.query_params.get("d"))


def drawing_grid(shape: tuple[int, ...], mode: str, levels: int, live: bool, centre: str) -> Drawing:
    """Show the grid; return what is on it.

    The key holds the shape alone: a drawing outlives a change of dataset, and a service that comes and goes.
    """
    component = st.components.v2.component(
        "drawing_grid",
        html=(HERE / "grid" / "grid.html").read_text(),
        css=(HERE / "grid" / "grid.css").read_text(),
        js=(HERE / "grid" / "grid.js").read_text(),
    )
    state = st.session_state
    name = "x".join(map(str, shape))
    given = state.drawn.get(shape) or drawing_text(decode_drawing(st.query_params.get("d", ""), shape))
    result = component(
        key=f"grid-{name}",
        data={
            "height": shape[0],
            "width": shape[1],
            "channels": 1 if len(shape) == 2 else shape[2],
            "levels": levels,
            "known": mode,
            "live": live,
            "centre": centre,
            "ink": given,
            "load": state.load if state.load and len(state.load["ink"]) == text_size(shape) else None,
        },
        default={"ink": given},
        on_ink_change=lambda: None,
    )
    state.drawn[shape] = result.ink if isinstance(result.ink, str) else ""
    return parse_drawing(state.drawn[shape], shape)


def complete(client: ServiceClient, request: Request, levels: int, place: Any, coloured: bool) -> Ending:
    """Send a request, show rows as they come, return the finished endings. Raises ServiceError."""
    known, image = np.array(request.observed), np.array(request.image)
    blank = np.where(per_cell(known, image) == 1, image, -1)
    images = np.repeat(blank[None], request.num_samples, axis=0)

    def show() -> None:
        place.html(endings_html(Ending(request, levels, images), coloured))

    answer = receive(client, vars(request), images, stop, show)
    return Ending(request, levels, np.array(answer.completions), answer.log_probs, answer.seed, answer.model)


def show_ending(place: Any, note: Any, ending: Ending | None, coloured: bool, order: str, drawing: Drawing) -> None:
    """Show the last endings, or what to do to get some."""
    if ending is None:
        place.html('<div class="endings waiting"><p>Endings appear here, each with its exact probability.</p></div>')
        return
    place.html(endings_html(ending, coloured, order, drawing))
    legend = ""
    if coloured and ending.images.ndim == 3:
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


def start_from_picture(client: ServiceClient, dataset: str, model: ServedModel, label: int | None) -> None:
    """Let a picture, or a part of one, take the place of the drawing, after showing what is left of it on the grid."""
    state = st.session_state
    shape = shape_of(model)
    with st.expander("Start from a picture"):
        source = st.segmented_control(
            "Source",
            list(SOURCES),
            format_func=lambda name: SOURCES[name],
            default="model",
            required=True,
            key="source",
        )
        strength = None
        if source == "file":
            file = st.file_uploader("PNG or JPEG", type=PICTURES, max_upload_size=MAX_UPLOAD_MB)
            dark_ink = len(shape) == 2 and st.toggle("Dark ink on light paper", value=True)
            if file is not None:
                try:
                    strength = fit_picture(file.getvalue(), shape, dark_ink)
                except ValueError as error:
                    st.warning(str(error))
        else:

            def want(wanted: bool) -> None:
                state.example_wanted = wanted

            st.button("Make a picture", icon=":material/auto_awesome:", on_click=want, args=[True])
            if state.example_wanted:  # still, if a stroke interrupted the page
                try:
                    answer = wait_for(lambda: client.generate(dataset, label=label), DRAWING, lambda: want(False))
                    state.example = (dataset, strength_of(np.array(answer.images[0]), model.levels))
                except ServiceError as error:
                    st.warning(str(error))
                want(False)
            if state.example and state.example[0] == dataset:
                strength = state.example[1]
        if strength is None:
            return
        part = st.segmented_control(
            "Half left to the model",
            list(PARTS),
            format_func=lambda name: PARTS[name],
            default="" if source == "file" else "lower",
            required=True,
            key=f"part_{source}",
        )
        drawing = without(Drawing(strength, np.full(shape[:2], TOUCHED)), part)
        with st.container(horizontal=True, vertical_alignment="center"):
            shown = np.where(per_cell(drawing.mark == HOLE, strength), -1, levels_of(drawing, model.levels))
            picture = data_url(as_png(whole_pixels(shown, model.levels)))
            st.html(f'<img class="small" src="{picture}" alt="The picture, as the grid will show it">', width="content")
            st.caption(f"This is what {shape[0]} x {shape[1]} cells keep of it.", width="stretch")

            def put() -> None:
                state.load = {"revision": uuid.uuid4().hex, "ink": drawing_text(drawing)}
                if part and len(shape) == 2:
                    # The other half counts as a whole, its blanks too.
                    state[known_key(False, COMPLETES in model.scores)] = "touched"

            st.button("Put it on the grid", on_click=put)
        if not part:
            st.caption("Then brush a hole (H) into it, and the model fills it in.")


def what_is_missing(trouble: str) -> str:
    """Say why no dataset can be drawn."""
    return trouble or "No model is promoted yet. Run `make pipeline`, then press Complete again."


def main() -> None:
    """Show the page."""
    st.set_page_config(page_title="PixelCNN canvas", page_icon="\N{PENCIL}\N{VARIATION SELECTOR-16}", layout="wide")
    st.html(HERE / "page.css")
    settle()
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
        st.warning(what_is_missing(state.models_trouble))
        st.button("Try again", on_click=forget_models)
    elif page == "Generate":
        generate_page(client, state.models)
    elif page == "Surprise":
        surprise_page(client, state.models, state.drawn)
    else:
        models_page(state.models)


def known_key(painting: bool, sees_all: bool) -> str:
    """Return where the mode is kept: apart for each default, as a link leaves out what is the default."""
    return "known_paint" if painting else "known_all" if sees_all else "known"


def choose_known(painting: bool, sees_all: bool) -> str:
    """Show what may count as known; return the chosen one.

    Args:
        sees_all: the model takes into account what is known below a cell, too: then no rows need to be above others.
    """
    modes = PAINT_KNOWN_MODES if painting else KNOWN_MODES
    return st.segmented_control(
        "What the model must keep",
        list(modes),
        format_func=lambda name: modes[name],
        default="ink" if painting or sees_all else "above",
        required=True,
        label_visibility="collapsed",
        width="stretch",
        wrap=True,
        key=known_key(painting, sees_all),
        bind="query-params",
    )


def known_help(mode: str, painting: bool, sees_all: bool) -> str:
    """Return a sentence on what counts as known, in this mode and for such a model."""
    if painting:
        return PAINT_KNOWN_HELP[mode]
    if mode == "ink" and sees_all:
        return "Your ink is kept, wherever it is: the model sees all of it, and may fill in any other cell."
    return KNOWN_HELP[mode]


def draw_page(client: ServiceClient, served: dict[str, ServedModel]) -> None:
    """Draw; endings appear."""
    state = st.session_state
    st.title("Draw the beginning. PixelCNN finishes it.", anchor=False)
    # In the order of a phone: grid, button, endings, settings. What needs the settings is filled last. Above the grid
    # nothing may be `st.empty`, which vanishes for a moment at each redrawing: the grid would move under the hand.
    intro = st.container()
    left, right = st.columns(2, gap="medium")
    with left:
        mode_place = st.container()
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
        help_place = st.container()
    with right:
        status, place, note = st.empty(), st.empty(), st.empty()
        actions = st.container(horizontal=True, vertical_alignment="center")
    left, right = st.columns(2, gap="medium")
    with left:
        picture_place = st.container()
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
        painting = model is not None and model.shape[0] == 3
        sees_all = model is not None and COMPLETES in model.scores
        coloured = painting or st.toggle(
            "Colour what the model added", value=True, key="coloured", persist_state="session"
        )
    shape = shape_of(model) if model else (28, 28)
    levels = model.levels if model else 2
    if painting:
        beginning = "Paint a part of a picture"
    elif dataset.startswith("mnist") or not dataset:
        beginning = "Draw a part of a digit" if sees_all else "Start a digit from the top"
    else:
        beginning = "Draw the upper part of a picture"
    intro.markdown(
        f"{beginning} and press **Complete**: the model shows {num_samples} {'ways' if num_samples > 1 else 'way'} "
        "it could go on."
    )
    with mode_place:
        mode = choose_known(painting, sees_all)
    help_place.caption(known_help(mode, painting, sees_all))
    centre = "" if painting else "mass" if dataset.startswith("mnist") else "box"
    with grid_place:
        drawing = drawing_grid(shape, mode, levels, live, centre)
    known = known_cells(drawing, mode, levels)
    image = levels_of(drawing, levels)
    image *= per_cell(known, image)
    # Endings of another shape could not be continued from: they wait until such images are drawn again.
    last = state.ending if state.ending and state.ending.images.shape[1:] == shape else None
    with actions:
        order = "likely"
        if last:
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
            downloads(last, coloured, order)
    show_ending(place, note, last, coloured, order, drawing)
    earlier = [ending for ending in state.gallery if ending.images.shape[1:] == shape]
    if earlier:
        st.caption("This visit: the likeliest ending each time")
        st.html(gallery_html(earlier))
    if model:
        st.caption(f"Serving {model_line(model)}")
        with picture_place:
            start_from_picture(client, dataset, model, label)

    try:
        seed = parse_seed(typed)
    except ValueError as error:
        status.warning(str(error))
        return
    if model is None:
        state.pending = False
        status.warning(what_is_missing(state.models_trouble))
        return
    chosen = last is not None and any(np.array_equal(image, ending) for ending in last.images)
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
                ending = complete(client, request, levels, place, coloured)
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
