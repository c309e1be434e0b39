"""What the page does in the browser beside the grid: its address, and what endings look like while one draws."""

from pathlib import Path

import streamlit as st

from app.canvas.endings import Endings
from app.canvas.texts import language, say

HERE = Path(__file__).parent


def companion(ending: Endings | None) -> None:
    """Show a button that copies the link to endings, or to the page; keep the address that of the last ones.

    Endings of a drawing can be compared with it.
    """
    buttons = (
        f'<button type="button" class="compare" aria-pressed="false">{say("compare")}</button>'
        f'<button type="button" class="copy">{say("copy_link")}</button><span role="status"></span>'
    )
    component = st.components.v2.component(
        f"companion_{language()}",
        html=f'<div class="companion">{buttons}</div>',
        css=(HERE / "companion.css").read_text(),
        js=(HERE / "companion.js").read_text(),
    )
    component(
        key="companion",
        data={
            "query": ending.link if ending else "",
            "drawing": ending.drawing if ending else "",
            "copy": say("copy_link"),
            "copied": say("copied"),
            "language": language(),
        },
    )
