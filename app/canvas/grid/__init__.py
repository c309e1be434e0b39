"""The drawing grid: a component that keeps the drawing in the browser, with its own undo, touch and keyboard.

Any Streamlit app can show one: `from app.canvas.grid import drawing_grid`; `example.py` beside this file does.
"""

import string
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from app.canvas.drawing import Drawing, blank_drawing, drawing_text, parse_drawing
from app.canvas.texts import LANGUAGES, TEXTS, language, say

HERE = Path(__file__).parent
BRUSHES = (1, 2, 3, 5, 8)  # cells, as in grid.js
CELLS_PER_STROKE = 14  # MNIST's strokes are two of 28 cells wide


def drawing_grid(
    shape: tuple[int, ...],
    *,
    key: str,
    levels: int = 2,
    known: str = "ink",
    value: Drawing | None = None,
    demonstration: Drawing | None = None,
    load: dict[str, str] | None = None,
    live: bool = False,
    brush: int | None = None,
    shortcuts: bool = True,
    on_change: Callable[[], None] | None = None,
) -> Drawing:
    """Show a grid to draw on; return what is on it: its strengths, and which cells were touched or left to others.

    Every finished stroke reruns the page. What is drawn lives in the browser: it outlives a lost connection, a reload
    and another page. Anything on the page with an attribute `data-ink` takes the place of the drawing when clicked:
    the strengths of all cells, two hexadecimal digits each, with or without their marks (`drawing_text`). At every
    change the page's `document` gets an event `drawing` with `detail` {text, blank}.

    Args:
        shape: (H, W) for ink, (H, W, 3) for paint of any colour.
        key: of the component; one key, one shape.
        levels: K, 2 to 256, which the shown ink is rounded to (`levels_of`).
        known: what is shown as known, the rest being hatched: a mode of `app.canvas.drawing.known_cells`.
        value: what a grid shows that has nothing yet to remember; empty by default.
        demonstration: what it then draws by itself, stroke by stroke, if `value` is empty; the first own stroke begins
            a new drawing.
        load: {revision, ink}: a drawing's text that takes the place of what is on the grid, once per revision.
        live: whether a stroke is told while it is drawn, not only at its end.
        brush: cells, the width of the pen at first: 1, 2, 3, 5 or 8; one that suits the shape by default.
        shortcuts: whether the page's keys choose tools (P, E, B, H, S, 1 to 8), undo (Ctrl+Z) and clear (Delete).
        on_change: called before the page runs after a stroke.
    """
    given = drawing_text(value or blank_drawing(shape))
    names = {name: texts[LANGUAGES.index(language())] for name, texts in TEXTS.items()}
    names |= {f"brush_{width}": say("brush", width=width) for width in BRUSHES}
    component = st.components.v2.component(
        f"drawing_grid_{language()}",
        html=string.Template((HERE / "grid.html").read_text()).safe_substitute(names),
        css=(HERE / "grid.css").read_text(),
        js=(HERE / "grid.js").read_text(),
    )
    result = component(
        key=key,
        data={
            "shape": list(shape),
            "levels": levels,
            "known": known,
            "live": live,
            "brush": brush or min(BRUSHES, key=lambda width: abs(width - min(shape[:2]) / CELLS_PER_STROKE)),
            "shortcuts": shortcuts,
            "ink": given,
            "demonstration": drawing_text(demonstration) if demonstration else "",
            "load": load if load and len(load["ink"]) == len(given) else None,
            "texts": {name: names[name] for name in ("cell", "cell_ink", "cell_blank", "cell_unknown")},
        },
        default={"ink": given},
        on_ink_change=on_change or (lambda: None),
    )
    return parse_drawing(result.ink, shape)
