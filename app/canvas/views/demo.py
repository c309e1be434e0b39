"""What `make demo` tells the page: the training that goes on beside it, and the link that it is shared by."""

import hmac
import json
import math
import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import segno
import streamlit as st

from app.canvas.session import Visit
from app.canvas.texts import say

STATUS_VARIABLE = "PIXELCNN_DEMO_STATUS"  # a file that app/demo.py writes; none, or empty, without a quick start
SHARE_VARIABLE = "PIXELCNN_DEMO_SHARE"  # the link, with its token; none where nobody else can come
TOKEN = "token"  # its name in the link
COOKIE = "pixelcnn_token"  # keeps it while the address changes
KEEP_TOKEN = """
export default function ({ data }) {
  document.cookie = `${data}; path=/; SameSite=Strict`;
}
"""
POLL_S = 2
ENDED = ("done", "failed")
QUICK_START = "mnist5k"  # the dataset


def read_status() -> dict[str, str]:
    """Return what the demo last said, empty if nothing or without a demo."""
    try:
        return dict(json.loads(Path(os.environ[STATUS_VARIABLE]).read_text()))
    except (KeyError, OSError, ValueError):
        return {}


def status_text(status: dict[str, str]) -> str:
    """Say in one line what is trained beside the page, how good it is and how long it still takes."""
    if status.get("doing") in ENDED:
        return say(f"quick_start_{status['doing']}")
    if "what" not in status:
        return ""
    told = ["training", *(key for key in ("validation", "left") if key in status)]
    return " · ".join(say(key, **status) for key in told)


def training_line(visit: Visit) -> None:
    """Show that line, and keep it up to date as long as something is trained, or its model is not served yet."""
    if not os.environ.get(STATUS_VARIABLE):
        return

    def told() -> dict[str, str]:
        status = read_status()
        return {} if status.get("doing") == "done" and QUICK_START not in visit.models else status

    ends = told().get("doing") in ENDED

    @st.fragment(run_every=None if ends else POLL_S)
    def line() -> None:
        if not ends and read_status().get("doing") == "done":
            visit.models_at = -math.inf
            visit.refresh_models()
        status = told()
        if not ends and status.get("doing") in ENDED:
            st.rerun()  # the page then offers the new champion, and nothing is asked any more
        if text := status_text(status):
            st.caption(text)

    with st.container(key="beside"):
        line()


def admit() -> None:
    """Stop here for who has not come by the link, where the page is shared by one."""
    [token] = parse_qs(urlsplit(os.environ.get(SHARE_VARIABLE, "")).query).get(TOKEN, [""])
    sent = st.query_params.get(TOKEN) or str(st.context.cookies.get(COOKIE, ""))
    if not token:
        return
    if "admitted" not in st.session_state and not hmac.compare_digest(sent.encode(), token.encode()):
        st.error(say("not_invited"))
        st.stop()
    st.session_state.admitted = token  # a link that is copied has it, too
    st.components.v2.component("keep_token", js=KEEP_TOKEN)(data=f"{COOKIE}={token}", key="keep_token")


def invitation() -> None:
    """Show the link to others and its QR code, where the page is shared."""
    if link := os.environ.get(SHARE_VARIABLE):
        with st.popover(say("invite"), icon=":material/qr_code_2:"):
            st.caption(say("invite_help"))
            code = segno.make(link, micro=False).svg_data_uri(scale=5, border=3, light="white")
            st.html(f'<img src="{code}" alt="{say("invite_picture")}">')
            st.code(link, language=None, wrap_lines=True)
