"""The canvas: draw, send to the service, show how the drawing could go on.

Run with `streamlit run app/canvas/main.py`: its server imports this file, and finds its `app`; for each visit it runs
it as a script. The canvas knows the service's wire alone (`app.client`): no model, no likelihood here.
"""

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from starlette.routing import Route
from streamlit.starlette import App

from app.canvas.live import answer_live, live_path
from app.canvas.origins import OwnOrigin
from app.canvas.session import Visit, this_visit
from app.canvas.texts import language, say
from app.canvas.views.demo import admit, invitation, training_line
from app.canvas.views.draw import draw_page
from app.canvas.views.generate import generate_page
from app.canvas.views.models import models_page
from app.canvas.views.surprise import surprise_page
from app.canvas.waiting import waiting_fragments
from app.canvas.widgets import show_trouble
from app.client import ServiceError


@st.cache_resource
def freeze_garbage() -> None:
    """Exempt what is loaded from garbage collection: Streamlit collects after each redrawing, 40 ms without strokes."""
    gc.collect()
    gc.freeze()


def show_page(name: str, show: Callable[[Visit], None], visit: Visit) -> None:
    """Show a page; each but the first needs a model."""
    st.title(say(f"{name}_title"), anchor=False)
    if name == "draw" or visit.models:
        show(visit)
    else:
        show_trouble(visit)


def main() -> None:
    st.set_page_config(page_title="PixelCNN canvas", page_icon="\N{PENCIL}\N{VARIATION SELECTOR-16}", layout="wide")
    st.html(Path(__file__).with_name("page.css"))
    # Streamlit calls every page English.
    st.html(f'<script>document.documentElement.lang = "{language()}"</script>', unsafe_allow_javascript=True)
    freeze_garbage()
    admit()
    try:
        visit = this_visit()
    except ServiceError as error:
        st.error(str(error))
        st.stop()
    visit.refresh_models()
    shows = {"draw": draw_page, "generate": generate_page, "surprise": surprise_page, "models": models_page}
    pages = [
        st.Page(functools.partial(show_page, name, show, visit), title=say(name), url_path=name, default=name == "draw")
        for name, show in shows.items()
    ]
    st.navigation(pages, position="top").run()
    training_line(visit)
    invitation()
    # A stroke made meanwhile: Streamlit would not send the grid of this run, and the browser would make a new one.
    if waiting_fragments():
        st.rerun()


if __name__ == "__main__":
    main()
else:
    live = Route(live_path(), answer_live, methods=["POST"])
    app = App(__file__, routes=[live], middleware=[Middleware(OwnOrigin)])
