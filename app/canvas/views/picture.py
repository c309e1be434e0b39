"""A part of the draw page: a picture, or a part of one, takes the place of the drawing."""

import functools
import uuid

import numpy as np
import streamlit as st

from app.canvas.drawing import HOLE, TOUCHED, Drawing, drawing_text, levels_of, per_cell, strength_of, without
from app.canvas.endings import Settings
from app.canvas.rendering import img, whole_pixels
from app.canvas.session import Visit
from app.canvas.texts import say
from app.canvas.waiting import once, wait_for
from app.canvas.widgets import choose, in_words, known_key, upload_picture
from app.client import ServiceError


def start_from_picture(visit: Visit, settings: Settings) -> None:
    """Let a picture take the place of the drawing, after showing what is left of it on the grid."""
    shape, levels = settings.shape, settings.levels
    with st.expander(say("picture")):
        names = {name: say(f"source_{name}") for name in ("file", "model")}
        source = choose(say("source"), names, "file", key="source")
        if source == "file":
            st.caption(say("picture_ways"))
            strength, trouble = upload_picture(say("upload"), visit, settings.dataset)
            if trouble:
                st.warning(trouble)
        else:
            st.caption(say("made_by_model"))
            strength = made_picture(visit, settings)
        if strength is None:
            return
        default = "" if source == "file" else "lower"
        names = {name: say(f"half_{name or 'none'}") for name in ("", "lower", "upper", "left", "right")}
        part = choose(say("half"), names, default, key=f"part_{source}")
        drawing = without(Drawing(strength, np.full(shape[:2], TOUCHED)), part)
        with st.container(horizontal=True, vertical_alignment="center"):
            shown = np.where(per_cell(drawing.mark == HOLE, strength), -1, levels_of(drawing, levels))
            st.html(img(whole_pixels(shown, levels), say("as_shown"), "small"), width="content")
            st.caption(say("cells_keep", height=shape[0], width=shape[1]), width="stretch")

            def put() -> None:
                visit.load = {shape: {"revision": uuid.uuid4().hex, "ink": drawing_text(drawing)}}
                if part and len(shape) == 2:
                    # The other half counts as a whole, its blanks too.
                    st.session_state[known_key(False, settings.sees_all)] = "touched"

            st.button(say("put"), on_click=put)
        if not part:
            st.caption(say("brush_hole"))


def made_picture(visit: Visit, settings: Settings) -> np.ndarray | None:
    """Show a button that has the model make a picture; return the strengths of the last one, or None."""
    want = functools.partial(setattr, visit, "example_wanted")
    kind = (settings.dataset, settings.shape)
    st.button(say("make_picture"), icon=":material/auto_awesome:", on_click=want, args=[True])
    if visit.example_wanted:  # still, if a stroke interrupted the page
        ask = functools.partial(visit.client.generate, settings.dataset, label=settings.label)
        try:
            [answer] = wait_for(once(ask), "picture", say("drawing"), lambda: want(False))
            visit.example = (kind, strength_of(np.array(answer.images[0]), settings.levels))
        except ServiceError as error:
            st.warning(in_words(error))
        want(False)
    return visit.example[1] if visit.example and visit.example[0] == kind else None
