"""The page of models: what serves, how good it is, and where it comes from."""

import html
from collections.abc import Mapping

import streamlit as st

from app.canvas.endings import nll_of, version_of
from app.canvas.session import Visit
from app.canvas.texts import TEXTS, say


def models_page(visit: Visit) -> None:
    """Show what is served, dataset by dataset."""
    st.markdown(say("models_intro"))
    for dataset, model in visit.models.items():
        with st.container(border=True):
            st.header(version_of(model.model), anchor=False)
            channels, height, width = model.shape
            colour = " x 3" if channels == 3 else ""
            facts = {"levels": model.levels, "architecture": model.architecture, "protocol": model.protocol}
            st.markdown(say("model_facts", height=height, width=width, colour=colour, **facts))
            if nll := nll_of(model):
                st.metric(say("test_nll", protocol=model.protocol), nll)
            if (papers := f"papers_{dataset}") in TEXTS:
                st.caption(say("beside", papers=say(papers)))
            lineage = {say(key): model.model[key] for key in ("data_hash", "git_commit", "run_id", "weights_sha256")}
            promoted = {say("promoted"): model.promoted_at} if model.promoted_at else {}  # released weights are not
            st.html(facts_html(lineage | promoted))
            with st.expander(say("all_scores")):
                numbers = {name: value for name, value in model.scores.items() if isinstance(value, int | float)}
                st.html(facts_html({name: number_text(value) for name, value in sorted(numbers.items())}))


def number_text(value: float) -> str:
    """Write a count in full, and any other score in six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def facts_html(facts: Mapping[str, str]) -> str:
    """Return names and values as a table."""
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts">{"".join(rows)}</table>'
