"""The page to draw on: the beginning of a picture, and the endings that a model finds for it."""

import functools
import html
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import streamlit as st

from app.canvas import widgets
from app.canvas.companion import companion
from app.canvas.drawing import (
    Drawing,
    decode_drawing,
    drawing_text,
    encode_drawing,
    known_cells,
    levels_of,
    parse_drawing,
    per_cell,
)
from app.canvas.endings import Ending, Request, order_of, version_of
from app.canvas.examples import beginnings_of
from app.canvas.grid import drawing_grid
from app.canvas.rendering import ADDED_INK, INK, endings_html, examples_html, gallery_html
from app.canvas.session import Visit, linked_default, shape_of
from app.canvas.texts import say, say_label
from app.canvas.views.known import choose_known, known_help
from app.canvas.views.picture import start_from_picture
from app.canvas.views.surprise import log_probs_by_label, surprise_beside
from app.canvas.waiting import complete, is_of_fragment, redraw, wait_for
from app.client import ServedModel, ServiceClient, ServiceError

NUM_ENDINGS = 9
MAX_ENDINGS = 16
GALLERY = 12  # past requests of a visit that are kept
COMPLETES = "test/completion_top_nats"  # a score that every model with a context network has
ORDERS = ("drawn", "likely", "rare")  # as drawn: in fixed places, while they bend with the pen


@dataclass(frozen=True)
class Settings:
    """What is chosen below the endings, and what follows from it for the page."""

    dataset: str
    model: ServedModel | None  # None as long as nothing serves the dataset
    mode: str  # of `known_cells`
    num_samples: int
    label: int | None
    temperature: float
    seed: int | None  # None where none is typed
    trouble: str  # what is wrong with the seed that was typed
    painting: bool  # images are in colour
    sees_all: bool  # the model takes into account what is known below a cell, too
    named: bool  # endings are to be named
    coloured: bool  # endings show by colour what the model added

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return shape_of(self.model) if self.model else (28, 28)

    @property
    def levels(self) -> int:
        """K of the images."""
        return self.model.levels if self.model else 2

    @property
    def query(self) -> dict[str, str]:
        """What of them an address tells, beside the drawing and the seed of its endings."""
        return {
            "dataset": self.dataset,
            "known": self.mode,
            "label": str(-1 if self.label is None else self.label),
            "temperature": str(self.temperature),
            "n": str(self.num_samples),
        }


def draw_page(client: ServiceClient, visit: Visit) -> None:
    """Show the grid, the endings and the settings; ask for new endings when they are wanted."""
    st.title(say("draw_title"), anchor=False)
    # In the order of a phone: grid, button, endings, settings. What needs the settings is filled last. Above the grid
    # nothing may be `st.empty`, which vanishes for a moment at each redrawing: the grid would move under the hand.
    intro = st.container(key="intro")
    board_place = st.container()
    left, right = st.columns(2, gap="medium")
    with right:
        picture_place = st.container()
        with st.expander(say("keys")):
            st.markdown(say("keys_table"))
    with left:
        settings = choose_settings(visit)
    rows = " two-rows" if settings.levels > 2 else ""  # of tools: page.css leaves room for them
    intro.html(f'<p class="intro{rows}">{html.escape(introduction(settings))}</p>')
    gallery_place = st.empty()
    if settings.model:
        st.caption(say("serving", model=model_line(settings.model)))
    with board_place:
        board(client, visit, settings, gallery_place)
    if settings.model:
        with picture_place:
            start_from_picture(client, visit, settings.dataset, settings.model, settings.label, settings.sees_all)


@st.fragment
def board(client: ServiceClient, visit: Visit, settings: Settings, gallery_place: Any) -> None:
    """Show the grid, and what comes of a drawing: after a stroke this alone runs, the endings first."""
    with st.container(key="board"):
        left, right = st.columns(2, gap="medium")
    with left:
        grid_place = st.container()
        button_place = st.container(key="go", horizontal=True, vertical_alignment="center")
        examples_place = st.container()
    with right:
        beside_place = st.container()
        away_place = st.container()  # what is redrawn by itself must not stand in an `st.empty`, which may be gone then
        status, place, note = st.empty(), st.empty(), st.empty()
        actions = st.container(key="actions", horizontal=True, vertical_alignment="center")
    model, levels = settings.model, settings.levels
    beginnings = beginnings_of(settings.dataset)
    live = st.session_state.get("live", True)
    with grid_place:
        drawing = show_grid(visit, settings, live, beginnings)
    image, known = sent_of(drawing, settings)
    order = st.session_state.get("order") or ORDERS[0]

    def show_endings() -> Ending | None:
        # Endings of another shape could not be continued from: they wait until such images are drawn again.
        last = next(iter(earlier_endings(visit, settings)), None) if drawing.mark.any() else None
        is_newer = visit.unfinished is not None and visit.unfinished.images.shape[1:] == settings.shape
        show_ending(place, note, last, visit.unfinished if is_newer and drawing.mark.any() else None, settings, order)
        return last

    last = show_endings()
    at_once = is_of_fragment() and is_wanted(visit, settings, image, drawing, live) and not known.all()
    if at_once:
        with status:  # what else stands on the page can wait: the browser needs a tenth of a second for it
            answer(client, visit, settings, drawing, image, known, place, order)
        last = show_endings()
        served = visit.models
        visit.refresh_models(client)
        if visit.models != served:
            st.rerun()
    if not drawing.mark.any():
        visit.seed = visit.seed if visit.pending else None  # the next drawing gets a new one
    is_answer = last is not None and last.settings == settings.query and last.drawing == drawing_text(drawing)
    with button_place:
        name = say("nine") if settings.num_samples == NUM_ENDINGS else str(settings.num_samples)
        label = say("another", number=name) if is_answer else say("complete")
        if widgets.main_button(label, on_click=visit.want_endings) and not at_once:
            visit.pending = True  # a visit that goes on after a restart of this program has no callback yet
        live = st.toggle(say("live"), value=True, key="live", persist_state="session")
    with actions:
        if last:
            names = {key: say(f"order_{key}") for key in ORDERS}
            widgets.choose(
                say("order"), names, ORDERS[0], label_visibility="collapsed", key="order", persist_state="session"
            )
            shown = levels_of(drawing, levels)
            chosen = next((i for i, ending in enumerate(last.images) if np.array_equal(ending, shown)), None)
            widgets.download(last, settings.coloured, order, 3, chosen)
        companion(last, comparable=last is not None)
        beside = st.toggle(say("surprise"), key="surprise_beside", persist_state="session")
    if beginnings:
        examples_place.html(examples_html(beginnings, levels))
    with gallery_place.container():
        if earlier := earlier_endings(visit, settings):
            st.caption(say("gallery"))
            st.html(gallery_html(earlier))

    if settings.trouble:
        status.warning(settings.trouble)
        return
    if model is None:
        with away_place:
            widgets.show_trouble(visit)
        return
    if is_wanted(visit, settings, image, drawing, live):
        if known.all():
            visit.pending = False
            status.warning(say("nothing_left"))
            return
        with status:
            answered = answer(client, visit, settings, drawing, image, known, place, order)
        if answered:
            redraw()
    if beside:
        with beside_place:
            surprise_beside(client, visit, settings.dataset, model, levels_of(drawing, levels))
    if settings.named and last and not last.names and model.labels:
        name_endings(client, visit, last, model)
        redraw()
    if visit.trouble:
        with away_place:
            widgets.show_trouble(visit)


def earlier_endings(visit: Visit, settings: Settings) -> list[Ending]:
    """Return the visit's endings of images like these, the last ones first."""
    return [ending for ending in visit.gallery if ending.images.shape[1:] == settings.shape]


def is_wanted(visit: Visit, settings: Settings, image: np.ndarray, drawing: Drawing, live: bool) -> bool:
    """Return whether endings of a drawing are wanted: by the button, or live of what is no ending itself."""
    if settings.trouble or settings.model is None:
        return False
    is_taken = any(np.array_equal(image, ending) for past in earlier_endings(visit, settings) for ending in past.images)
    return visit.pending or (live and bool(drawing.mark.any()) and not is_taken)


def answer(
    client: ServiceClient,
    visit: Visit,
    settings: Settings,
    drawing: Drawing,
    image: np.ndarray,
    known: np.ndarray,
    place: Any,
    order: str,
) -> bool:
    """Have endings drawn that are wanted; show them in their place while they come, and keep them.

    Args:
        image, known: what is sent of the drawing.

    Returns:
        Whether they were asked for: live, the same request is not sent twice.
    """
    request = Request(
        dataset=settings.dataset,
        image=image.tolist(),
        observed=known.tolist(),
        num_samples=settings.num_samples,
        label=settings.label,
        temperature=settings.temperature,
        seed=visit.own_seed() if settings.seed is None else settings.seed,
    )
    if request == visit.answered and not visit.pending:
        return False
    visit.asked = request
    made_of = functools.partial(
        replace, settings=settings.query, drawing=drawing_text(drawing), linked=encode_drawing(drawing)
    )

    def show(unfinished: Ending) -> None:
        visit.unfinished = made_of(unfinished)
        place.html(endings_html(visit.unfinished, settings.coloured, order))

    try:
        ending = complete(client, request, settings.levels, visit.want_no_endings, show)
    except ServiceError as error:
        visit.fail(error)
        visit.unanswered = error.away
    else:
        visit.answer_came()
        ending = made_of(ending)
        visit.gallery = [ending, *visit.gallery][:GALLERY]
        place.html(endings_html(ending, settings.coloured, order))
    visit.pending, visit.answered, visit.unfinished = False, request, None
    return True


def name_endings(client: ServiceClient, visit: Visit, ending: Ending, model: ServedModel) -> None:
    """Have the last endings named: by the label that explains each best."""

    def ask() -> list[str]:
        dataset = ending.request.dataset
        found = [log_probs_by_label(client, dataset, len(model.labels), image) for image in ending.images]
        return [say_label(model.labels[int(np.argmax(log_probs))]) for log_probs in found]

    try:
        named = replace(ending, names=wait_for(ask, say("asking"), lambda: None))
    except ServiceError as error:
        visit.fail(error)
        named = replace(ending, names=[""] * len(ending.images))
    visit.gallery = [named if past is ending else past for past in visit.gallery]


def show_grid(visit: Visit, settings: Settings, live: bool, beginnings: list[Drawing]) -> Drawing:
    """Show the grid; return what is on it. Its key holds the shape alone: a drawing outlives a change of dataset."""
    shape = settings.shape
    kept = visit.drawn.get(shape)
    drawing = drawing_grid(
        shape,
        key=f"grid-{'x'.join(map(str, shape))}",
        levels=settings.levels,
        known=settings.mode,
        value=decode_drawing(visit.linked, shape) if kept is None else parse_drawing(kept, shape),
        demonstration=beginnings[0] if beginnings else None,
        load=visit.load,
        live=live,
    )
    visit.drawn[shape] = drawing_text(drawing)
    return drawing


def sent_of(drawing: Drawing, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return what of a drawing is sent: levels, 0 where unknown, and (H, W) known cells."""
    known = known_cells(drawing, settings.mode, settings.levels)
    image = levels_of(drawing, settings.levels)
    return image * per_cell(known, image), known


def choose_settings(visit: Visit) -> Settings:
    """Show the settings; return them."""
    first, second = st.columns(2)
    with first:
        dataset = widgets.choose_dataset(visit.models)
    model = visit.models.get(dataset)
    painting = model is not None and model.shape[0] == 3
    sees_all = model is not None and COMPLETES in model.scores
    with second:
        label = widgets.choose_label(model.labels if model else [], say("finish_as"))
    with st.expander(say("advanced")):
        mode = choose_known(painting, sees_all)
        st.caption(known_help(mode, painting, sees_all))
        first, second = st.columns(2)
        with first:
            temperature = widgets.choose_temperature()
        with second:
            default = linked_default("n", "n", range(1, MAX_ENDINGS + 1), NUM_ENDINGS)
            num_samples = st.slider(say("endings"), 1, MAX_ENDINGS, default, key="n", persist_state="session")
        seed, trouble = widgets.choose_seed("typed_seed")
        named = st.toggle(say("named"), key="named", help=say("named_help"), persist_state="session")
        coloured = painting or st.toggle(say("coloured"), value=True, key="coloured", persist_state="session")
    return Settings(
        *(dataset, model, mode, num_samples, label, temperature, seed, trouble, painting, sees_all, named, coloured)
    )


def introduction(settings: Settings) -> str:
    """Say what to do here."""
    if settings.painting:
        beginning = "begin_paint"
    elif settings.dataset.startswith("mnist") or not settings.dataset:
        beginning = "begin_digit" if settings.sees_all else "begin_top"
    else:
        beginning = "begin_other"
    return say("intro", beginning=say(beginning), number=settings.num_samples)


def model_line(served: ServedModel) -> str:
    """Say in one line which version serves and how good it is, with the protocol."""
    model, scores = served.model, served.scores
    parts = [say("version", name=f"**{model.get('name')}**", version=model.get("version"))]
    key, unit = ("test/bits_per_dim", "bits/dim") if served.levels > 2 else ("test/nll_nats", say("nats_per_image"))
    if key in scores:
        number = scores.get("test/num_images")
        images = "" if number is None else say("line_images", number=f"{number:.0f}")
        parts.append(say("line_nll", nll=f"{scores[key]:.2f} {unit}", protocol=served.protocol, images=images))
    if model.get("git_commit"):
        parts.append(f"commit {str(model['git_commit'])[:7]}")
    return " · ".join(parts)


def show_ending(
    place: Any, note: Any, ending: Ending | None, unfinished: Ending | None, settings: Settings, order: str
) -> None:
    """Show the last endings, or what to do to get some.

    Args:
        unfinished: what came since then for a drawing that has changed meanwhile, in place of endings older still.
    """
    shown = unfinished or ending
    if shown is None:
        place.html(f'<div class="endings waiting"><p>{html.escape(say("waiting"))}</p></div>')
        return
    place.html(endings_html(shown, settings.coloured, order, stale=shown.settings != settings.query))
    if ending is None:
        return
    legend = ""
    if settings.coloured and ending.images.ndim == 3:
        legend = f'<span><i style="background: rgb{INK}"></i>{say("yours")}</span>'
        legend += f'<span><i style="background: rgb{ADDED_INK}"></i>{say("added")}</span>'
    named = ", ".join(ending.names[i] for i in order_of(ending, order)) if ending.names else ""
    came = html.escape(say("came_named" if named else "came", number=len(ending.images), names=named))
    by = html.escape(say("by", model=version_of(ending.model)))
    note.html(
        f'<p class="legend">{legend}<span>{say("nats_help")}</span><span>{by}</span></p>'
        f'<p class="spoken" role="status">{came}</p>'
    )
