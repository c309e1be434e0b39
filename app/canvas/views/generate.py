"""The page of whole images, drawn from nothing."""

import functools
import math

import numpy as np
import streamlit as st

from app.canvas import widgets
from app.canvas.endings import Endings, Request, shape_of, undrawn, version_of
from app.canvas.rendering import endings_html
from app.canvas.session import Visit
from app.canvas.texts import say
from app.canvas.waiting import drawn, wait_for
from app.client import ServiceError

NUM_IMAGES = 16


def generate_page(visit: Visit) -> None:
    """Generate a sheet of images at first, and when asked to; show the last one."""
    st.markdown(say("generate_intro"))
    left, right = st.columns([9, 21], gap="medium")
    with left:
        dataset = widgets.choose_dataset(visit.models)
        model = visit.models[dataset]
        label, temperature = widgets.choose_label(model.labels, say("draw")), widgets.choose_temperature()
        seed, wrong_seed = widgets.choose_seed("generate_seed")
        if widgets.main_button(say("generate")):
            visit.generate_wanted = True
            visit.retry_at = math.inf  # at once
    away_place, trouble, place = right.container(), right.empty(), right.empty()
    settings = {"dataset": dataset, "label": str(label), "temperature": str(temperature)}
    if wrong_seed:
        trouble.warning(wrong_seed)
        return
    if visit.generate_wanted and not visit.is_waiting:
        # An image of which nothing is known: its completion is what /generate draws, and comes row by row.
        nothing = np.zeros(shape_of(model), dtype=np.int64)
        observed = np.zeros(nothing.shape[:2], dtype=np.int64)
        seed = visit.seed if seed is None and visit.generated is None and not visit.linked else seed  # of the address
        request = Request(dataset, nothing.tolist(), observed.tolist(), NUM_IMAGES, label, temperature, seed)
        asked = undrawn(request, model.levels, settings)

        def show(sheet: Endings) -> None:
            if sheet.log_probs is None:
                place.html(endings_html(sheet, coloured=False, order="likely", sheet=True))
                return
            visit.generated, visit.generate_wanted = sheet, False
            visit.answer_came()

        try:
            stop = functools.partial(setattr, visit, "generate_wanted", False)
            ask_for = functools.partial(drawn, visit.client, asked)
            wait_for(ask_for, "drawing", say("drawing"), stop, show)
        except ServiceError as error:
            visit.fail(error)
            visit.generate_wanted = error.away  # then it is asked again
    with away_place:
        widgets.show_trouble(visit)
    if visit.generated is None:
        place.html(f'<div class="endings waiting"><p>{say("sixteen")}</p></div>')
        return
    stale = visit.generated.settings != settings
    place.html(endings_html(visit.generated, coloured=False, order="likely", stale=stale, sheet=True))
    with right.container(key="actions", horizontal=True, vertical_alignment="center"):
        with st.container(key="seed", horizontal=True, vertical_alignment="center"):
            st.caption(say("seed"), width="content")
            st.code(str(visit.generated.seed), language=None, width="content")
        st.caption(say("likeliest_first", model=version_of(visit.generated.model)), width="stretch")
        widgets.download(visit.generated, coloured=False, order="likely", columns=4)
        widgets.companion(visit.generated.link)
