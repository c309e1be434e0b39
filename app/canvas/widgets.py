"""The choices, uploads and downloads that pages have in common."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from app.canvas.endings import Endings, order_of, parse_seed, record, shape_of
from app.canvas.photo import find_ink, fit_picture
from app.canvas.rendering import large_image, saved_animation, saved_picture
from app.canvas.session import Visit
from app.canvas.texts import TEXTS, language, say, say_label
from app.client import ServedModel, ServiceError

Kind = TypeVar("Kind")
HERE = Path(__file__).parent
MAX_UPLOAD_MB = 10
KNOWN_KEYS = ("known", "known_all", "known_paint")  # of the widgets that hold the mode of `known_cells`
TEMPERATURE = 0.9  # more endings hold together than at 1, and as many differ: docs/endings.md


def choose(label: str, names: Mapping[str, str], default: str, **options: Any) -> str:
    """Show a row of choices, by the names of their keys; return the chosen key."""
    chosen: str = st.segmented_control(
        label, list(names), format_func=lambda key: names[key], default=default, required=True, **options
    )
    return chosen


def main_button(label: str, on_click: Callable[[], None] | None = None) -> bool:
    """Show the page's main button, which the key F presses, too, if keys do; return whether it was pressed."""
    options: dict[str, Any] = {"shortcut": "F"} if st.session_state.get("shortcuts", True) else {}
    options |= {"type": "primary", "icon": ":material/auto_awesome:", "width": "stretch"}
    return st.button(label, on_click=on_click, key="main", **options)


def linked_default(key: str, offered: Collection[Kind], default: Kind, name: str | None = None) -> Kind:
    """Return what a widget shows first, the address's value or the default; drop what it holds but cannot offer."""
    state = st.session_state
    if key in state and state[key] not in offered:
        del state[key]
    linked: Kind = state.get(f"linked_{name or key}", default)
    return linked if linked in offered else default


def name_of(dataset: str) -> str:
    """Return a dataset's name and what its images are."""
    return f"{dataset}: {say(f'about_{dataset}')}" if f"about_{dataset}" in TEXTS else dataset


def choose_dataset(served: Mapping[str, ServedModel]) -> str:
    """Show the datasets; return the chosen one, empty text if there is none."""
    if not served:  # under a key of its own, or the choice would be lost while the service is away
        st.selectbox(say("dataset"), [], key="no_dataset", placeholder=say("none_yet"))
        return ""
    offered = list(served)
    if st.session_state.get("linked_dataset", offered[0]) not in offered:
        st.session_state.pop("linked_label", None)  # of the address, too: it would be another dataset's
    first = offered.index(linked_default("dataset", offered, offered[0]))
    return st.selectbox(say("dataset"), offered, first, format_func=name_of, key="dataset", persist_state="session")


def choose_label(names: list[str], text: str) -> int:
    """Show the labels; return the chosen one's index, -1 for none."""
    if not names:
        st.selectbox(text, [say("anything")], key="no_label", disabled=True)
        return -1
    state = st.session_state
    if state.setdefault("label_of", names) != names:  # the index kept, or linked to, would be another label's
        state.label_of, state.label = names, -1
        state.pop("linked_label", None)
    shown = {-1: say("anything")} | {i: say_label(name) for i, name in enumerate(names)}
    offered = list(shown)
    first = offered.index(linked_default("label", offered, -1))
    return st.selectbox(text, offered, first, format_func=shown.__getitem__, key="label", persist_state="session")


def known_key(painting: bool, sees_all: bool) -> str:
    """Return where the mode is kept: apart for each default."""
    return KNOWN_KEYS[2 if painting else 1 if sees_all else 0]


def choose_known(painting: bool, sees_all: bool) -> str:
    """Show what may count as known, and what that means; return the chosen mode of `known_cells`.

    A model that `sees_all` takes into account what is known below a cell, too: no rows need to be above others.
    """
    # In colour no cell is blank: painted black, or not painted.
    modes = ("ink", "above", "mask") if painting else ("above", "ink", "touched", "mask")
    names = {mode: say("known_paint" if painting and mode == "ink" else f"known_{mode}") for mode in modes}
    key = known_key(painting, sees_all)
    default = linked_default(key, modes, "ink" if painting or sees_all else "above", "known")
    mode = choose(say("known"), names, default, width="stretch", wrap=True, key=key, persist_state="session")
    if painting:
        st.caption(say(f"help_paint_{mode}"))
    else:
        st.caption(say("help_ink_seen" if mode == "ink" and sees_all else f"help_{mode}"))
    return mode


def choose_temperature() -> float:
    first = linked_default("temperature", [round(0.05 * i, 2) for i in range(31)], TEMPERATURE)
    text, help_text = say("temperature"), say("temperature_help")
    return st.slider(text, 0.0, 1.5, first, 0.05, key="temperature", persist_state="session", help=help_text)


def choose_seed(key: str) -> tuple[int | None, str]:
    """Show the seed; return it, None where none is typed, and what is wrong with the one that is."""
    text = st.text_input(
        say("seed"), placeholder=say("seed_placeholder"), key=key, persist_state="session", help=say("seed_help")
    )
    return parse_seed(text)


def upload_picture(label: str, visit: Visit, dataset: str) -> tuple[np.ndarray | None, str]:
    """Show an upload; return its picture as strengths, (H, W) or (H, W, 3), or None, and what is wrong with it."""
    shape = shape_of(visit.models[dataset])
    file = st.file_uploader(label, type=["png", "jpg", "jpeg"], max_upload_size=MAX_UPLOAD_MB)
    if file is None:
        return None, ""
    try:
        if len(shape) == 3:
            return fit_picture(file.getvalue(), shape, dark_ink=False), ""
        layout = visit.layout(dataset)
        if st.toggle(say("find_ink"), value=layout.has_paper, help=say("find_ink_help")):
            return find_ink(file.getvalue(), shape, layout), ""
        return fit_picture(file.getvalue(), shape, st.toggle(say("dark_ink"), value=True)), ""
    except ServiceError as error:
        return None, in_words(error)
    except ValueError as error:
        return None, str(error)


def in_words(error: ServiceError) -> str:
    """Say in a visitor's words what keeps an answer away; the error itself is for whoever runs the page."""
    if error.busy:
        return say("busy")
    if str(error) == say("operator_no_model"):
        return say("no_model")
    return say("away" if error.away else "refused")


def show_trouble(visit: Visit) -> None:
    """Say what keeps an answer away, if anything does, in a visitor's words; count down to the next try if it helps."""
    if visit.trouble is None:
        return
    st.warning(in_words(visit.trouble))
    if visit.trouble.away:
        _count_down(visit)
    st.expander(say("operator")).markdown(str(visit.trouble))


@st.fragment(run_every=1.0)
def _count_down(visit: Visit) -> None:
    left = visit.retry_at - time.monotonic()
    if left <= 0:
        visit.retry()
        st.rerun()
    with st.container(horizontal=True, vertical_alignment="center"):
        if math.isfinite(left):
            st.caption(say("again_in", seconds=math.ceil(left)), width="content")
        if st.button(say("try_now"), key="try_now"):
            visit.retry()
            st.rerun()


def download(ending: Endings, coloured: bool, order: str, columns: int, chosen: int | None = None) -> None:
    """Offer to keep all endings, as a picture and as JSON that reproduces them, and the `chosen` or likeliest one."""
    one = order_of(ending, "likely")[0] if chosen is None else chosen
    offers: list[tuple[str, str, str, Callable[[], str | bytes]]] = [
        ("one", "png", "image/png", lambda: large_image(ending, ending.images[one], coloured)),
        ("all", "png", "image/png", lambda: saved_picture(ending, coloured, order, columns)),
        ("drawing", "png", "image/png", lambda: large_image(ending, ending.request.given, coloured)),
        ("animation", "gif", "image/gif", lambda: saved_animation(ending, one, coloured)),
        ("record", "json", "application/json", lambda: record(ending)),
    ]
    with st.popover(say("save"), icon=":material/download:"):
        for what, kind, mime, data in offers:
            if ending.known.any() or what in ("all", "animation", "record"):  # a sheet of whole images has no drawing
                name = f"{ending.request.dataset}-{ending.seed}-{what}.{kind}"
                st.download_button(say(f"save_{what}"), data, name, mime, key=f"save_{what}", on_click="ignore")


def companion(query: str, drawing: str = "") -> None:
    """Hand what is pasted or dropped to uploads; keep the address at what is shown; offer to copy it, to compare.

    `query` is of the address that shows it again, `drawing` the text of the grid that endings are of; "" for none.
    """
    compare = f'<button type="button" class="compare" aria-pressed="false">{say("compare")}</button>'
    copy = f'<button type="button" class="copy">{say("copy_link")}</button><span role="status"></span>'
    component = st.components.v2.component(
        f"companion_{language()}",
        html=f'<div class="companion">{compare}{copy}</div>',
        css=(HERE / "companion.css").read_text(),
        js=(HERE / "companion.js").read_text(),
    )
    admitted = st.session_state.get("admitted", "")
    component(key="companion", data={"query": query, "drawing": drawing, "copied": say("copied"), "token": admitted})
