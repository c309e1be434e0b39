"""The page to draw on: the beginning of a picture, and the endings that a model finds for it."""

import functools
import html
from dataclasses import replace
from typing import Any

import numpy as np
import streamlit as st

from app.canvas import widgets
from app.canvas.drawing import Drawing, drawing_text, levels_of
from app.canvas.endings import Endings, Settings, asked_of, nats, nll_of, order_of, version_of
from app.canvas.examples import beginnings_of
from app.canvas.grid import drawing_grid
from app.canvas.live import live_endings
from app.canvas.rendering import ADDED_INK, INK, endings_html, examples_html, gallery_html
from app.canvas.session import Visit
from app.canvas.texts import TEXTS, say, say_label
from app.canvas.views.picture import start_from_picture
from app.canvas.views.surprise import likelihoods, surprise_beside
from app.canvas.waiting import busy_line, drawn, redraw, wait_for
from app.client import ServedModel, ServiceError

NUM_ENDINGS = 9
MAX_ENDINGS = 16
COMPLETES = "test/completion_top_nats"  # a score that every model with a context network has
SETTINGS_KEYS = ("dataset", "label", *widgets.KNOWN_KEYS, "temperature", "n", "typed_seed", "named", "coloured")
ORDERS = ("drawn", "likely", "rare")  # as drawn: in fixed places, while they bend with the pen


def draw_page(visit: Visit) -> None:
    """Show the grid, the endings and the settings; ask for new endings when they are wanted."""
    # In the order of a phone: grid, button, endings, settings. What needs the settings is filled last. Above the grid
    # nothing may be `st.empty`, which vanishes for a moment at each redrawing: the grid would move under the hand.
    intro = st.container(key="intro")
    board_place = st.container()
    left, right = st.columns(2, gap="medium")
    with right:
        picture_place = st.container()
        with st.expander(say("keys")):
            st.toggle(say("shortcuts"), value=True, key="shortcuts", persist_state="session")
            st.markdown("\n".join(say(key) for key in TEXTS if key.startswith("key_")))  # the rows of a table
    with left:
        settings = choose_settings(visit)
    # Of tools: page.css leaves room for them.
    rows = " two-rows" if settings.levels > 2 or len(settings.shape) == 3 else ""
    intro.html(f'<p class="intro{rows}">{html.escape(introduction(settings))}</p>')
    gallery_place = st.empty()
    if settings.model:
        st.caption(say("serving", model=model_line(settings.model)))
    with board_place:
        board(visit, settings, chosen_now(), gallery_place)
    if settings.model:
        with picture_place:
            start_from_picture(visit, settings)


@st.fragment
def board(visit: Visit, settings: Settings, chosen: dict[str, Any], gallery_place: Any) -> None:
    """Show the grid, and what comes of a drawing: after a stroke this alone runs."""
    if chosen_now() != chosen:
        st.rerun()  # a setting was changed at the same moment as the drawing
    with st.container(key="board"):
        left, right = st.columns(2, gap="medium")
    grid_place = left.container()
    button_place = left.container(key="go", horizontal=True, vertical_alignment="center")
    examples_place = left.container()
    beside_place = right.container()
    away_place = right.container()  # what is redrawn by itself must not stand in an `st.empty`, which may be gone then
    live_place = right.container(key="live-endings")
    status = right.empty()
    place = right.container(key="page-endings").empty()
    note = right.container()
    actions = right.container(key="actions", horizontal=True, vertical_alignment="center")
    model, levels = settings.model, settings.levels
    # A dataset's name promises no shape: a checkpoint of smaller images may have been registered under it.
    beginnings = [one for one in beginnings_of(settings.dataset) if one.strength.shape == settings.shape]
    live = st.session_state.get("live", True)
    with grid_place:
        drawing = show_grid(visit, settings, live, beginnings)
    is_blank = not drawing.mark.any()
    if is_blank and not (visit.pending or visit.live_for or visit.live):
        visit.seed = None  # the next drawing gets a new one, unless it has: the browser was faster
    # To the browser, of this drawing or of a newer one, with these settings. Asked first: or what ends now is missed,
    # and what begins now is stopped for an older one.
    stop_live = visit.stop_live
    is_coming = visit.live_for == (settings.query, settings.seed)
    visit.take_live(drawing_text(drawing), settings)
    is_due = visit.pending or (live and not is_blank)
    asked = asked_of(drawing, settings, visit.own_seed() if is_due else visit.seed)
    visit.settings, visit.order = settings, st.session_state.get("order") or ORDERS[0]
    # Endings of another shape could not be continued from: they wait until such images are drawn again.
    earlier = [ending for ending in visit.gallery if ending.images.shape[1:] == settings.shape]
    last = earlier[0] if earlier and not is_blank else None
    is_answer = last is not None and (last.settings, last.drawing) == (asked.settings, asked.drawing)
    is_newer = visit.unfinished is not None and visit.unfinished.images.shape[1:] == settings.shape
    is_wanted = live and not is_blank and not visit.is_ending(asked)
    is_newer &= visit.pending or (is_wanted and not is_answer)  # else nobody finishes them, or the stroke was undone
    show_endings(place, note, last, visit.unfinished if is_newer and not is_blank else None, settings, visit.order)
    with button_place:
        name = say("nine") if settings.num_samples == NUM_ENDINGS else str(settings.num_samples)
        label = say("another", number=name) if is_answer else say("complete")
        if widgets.main_button(label, on_click=visit.want_endings):
            visit.pending = True  # a visit that goes on after a restart of this program has no callback yet
        live = st.toggle(say("live"), value=True, key="live", persist_state="session")
    with live_place:
        live_endings(visit, settings, last, is_on=live and not settings.trouble and model is not None)
    with actions:
        beside = show_actions(last, drawing, settings, visit.order)
    if beginnings:
        examples_place.html(examples_html(beginnings, levels))
    with gallery_place.container():
        if earlier:
            st.caption(say("gallery"))
            st.html(gallery_html(earlier))

    if settings.trouble:
        status.warning(settings.trouble)
        return
    if model is None:
        with away_place:
            widgets.show_trouble(visit)
        return
    if visit.pending or is_wanted:
        if asked.known.all():
            visit.pending = False
            status.warning(say("nothing_left"))
            return
        if is_blank:  # nobody would see them
            visit.pending = False
            redraw()
        if visit.pending:
            visit.stop_live()
        elif not is_coming:
            stop_live()
        if visit.pending or not (is_coming or asked.request == visit.answered):
            with status:
                answer(visit, asked, settings.coloured, place)
            redraw()
        if is_coming:
            with live_place:
                busy_line("live", say("drawing"), visit.want_no_endings)
    if beside:
        with beside_place:
            surprise_beside(visit, settings.dataset, model, levels_of(drawing, levels))
    unnamed = last if last and not last.names and last.request.dataset == settings.dataset else None
    if settings.named and unnamed and model.labels and not visit.is_waiting:
        name_endings(visit, unnamed, model)
        redraw()
    if visit.refresh_models():
        st.rerun()
    with away_place:
        widgets.show_trouble(visit)


def show_actions(last: Endings | None, drawing: Drawing, settings: Settings, order: str) -> bool:
    """Show what can be done with the last endings; return whether a map of surprise is wanted beside them."""
    if last:
        names = {key: say(f"order_{key}") for key in ORDERS}
        options: dict[str, Any] = {"label_visibility": "collapsed", "persist_state": "session", "wrap": True}
        widgets.choose(say("order"), names, ORDERS[0], key="order", **options)
        shown = levels_of(drawing, settings.levels)
        chosen = next((i for i, ending in enumerate(last.images) if np.array_equal(ending, shown)), None)
        widgets.download(last, settings.coloured, order, 3, chosen)
    widgets.companion(last.link if last else "", last.drawing if last else "")
    return st.toggle(say("surprise"), key="surprise_beside", persist_state="session")


def answer(visit: Visit, asked: Endings, coloured: bool, place: Any) -> None:
    """Have endings made; show them in their place while they come, and keep them."""
    visit.asked = asked.request

    def show(ending: Endings) -> None:
        if ending.log_probs is not None:
            visit.keep(ending)
            visit.pending = False
            return
        visit.unfinished = ending
        place.html(endings_html(ending, coloured, visit.order))

    ask_for = functools.partial(drawn, visit.client, asked)
    try:
        wait_for(ask_for, "drawing", say("drawing"), visit.want_no_endings, show)
    except ServiceError as error:
        visit.fail(error)
        visit.unanswered = error.away
        visit.answered, visit.unfinished, visit.pending = asked.request, None, False


def name_endings(visit: Visit, ending: Endings, model: ServedModel) -> None:
    """Have the last endings named: by the label that explains each best."""
    try:
        found = likelihoods(visit, ending.request.dataset, ending.images, range(len(model.labels)), "named")
        best = np.reshape([one.log_prob for one in found], (len(ending.images), -1)).argmax(axis=1)
        names = [say_label(model.labels[i]) for i in best]
        visit.answer_came()
    except ServiceError as error:
        visit.fail(error)
        if error.away:  # asked again
            return
        names = [""] * len(ending.images)
    named = replace(ending, names=names)
    visit.gallery = [named if past is ending else past for past in visit.gallery]


def show_grid(visit: Visit, settings: Settings, live: bool, beginnings: list[Drawing]) -> Drawing:
    """Show the grid; return what is on it. Its key holds the shape alone: a drawing outlives a change of dataset."""
    shape = settings.shape
    drawing = drawing_grid(
        shape,
        key=f"grid-{'x'.join(map(str, shape))}",
        levels=settings.levels,
        known=settings.mode,
        value=visit.drawing(shape),
        demonstration=beginnings[0] if beginnings else None,
        load=visit.load.get(shape),
        live=live,
        shortcuts=st.session_state.get("shortcuts", True),
    )
    visit.drawn[shape] = drawing_text(drawing)
    return drawing


def chosen_now() -> dict[str, Any]:
    """Return what the widgets of the settings hold, by their keys."""
    return {key: st.session_state.get(key) for key in SETTINGS_KEYS}


def choose_settings(visit: Visit) -> Settings:
    first, second = st.columns(2)
    with first:
        dataset = widgets.choose_dataset(visit.models)
    model = visit.models.get(dataset)
    painting = model is not None and model.shape[0] == 3
    sees_all = model is not None and COMPLETES in model.scores
    with second:
        label = widgets.choose_label(model.labels if model else [], say("finish_as"))
    with st.expander(say("advanced")):
        mode = widgets.choose_known(painting, sees_all)
        first, second = st.columns(2)
        with first:
            temperature = widgets.choose_temperature()
        default = widgets.linked_default("n", range(1, MAX_ENDINGS + 1), NUM_ENDINGS)
        num_samples = second.slider(say("endings"), 1, MAX_ENDINGS, default, key="n", persist_state="session")
        seed, trouble = widgets.choose_seed("typed_seed")
        named = st.toggle(say("named"), key="named", help=say("named_help"), persist_state="session")
        coloured = painting or st.toggle(say("coloured"), value=True, key="coloured", persist_state="session")
    return Settings(dataset, model, mode, num_samples, label, temperature, seed, trouble, sees_all, named, coloured)


def introduction(settings: Settings) -> str:
    what = "digit" if settings.dataset.startswith("mnist") or not settings.dataset else "other"
    beginning = "begin_paint" if len(settings.shape) == 3 else f"begin_{what}{'' if settings.sees_all else '_top'}"
    key = "intro_one" if settings.num_samples == 1 else "intro"
    return say(key, beginning=say(beginning), number=settings.num_samples)


def model_line(served: ServedModel) -> str:
    """Say in one line which version serves and how good it is, with the protocol."""
    model, scores = served.model, served.scores
    parts = [say("version", name=f"**{model.get('name')}**", version=model.get("version"))]
    if nll := nll_of(served, say("nats_per_image")):
        number = scores.get("test/num_images")
        images = "" if number is None else say("line_images", number=f"{number:.0f}")
        parts.append(say("line_nll", nll=nll, protocol=served.protocol, images=images))
    if model.get("git_commit"):
        parts.append(f"commit {str(model['git_commit'])[:7]}")
    return " · ".join(parts)


def show_endings(
    place: Any, note: Any, ending: Endings | None, unfinished: Endings | None, settings: Settings, order: str
) -> None:
    """Show the last endings, or `unfinished` ones that came since for a changed drawing, or what to do to get some."""
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
    named = ", ".join(filter(None, (ending.names[i] for i in order_of(ending, order)))) if ending.names else ""
    names = f" ({named})" if named else ""
    best = nats(max(ending.log_probs or [0.0]))  # the same text once more would not be spoken
    came = html.escape(say("came", number=len(ending.images), names=names, best=best))
    by = html.escape(say("by", model=version_of(ending.model)))
    note.html(
        f'<p class="legend">{legend}<span>{say("nats_help")}</span><span>{by}</span></p>'
        f'<p class="spoken" role="status">{came}</p>'
    )
