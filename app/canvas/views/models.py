"""The page of models: what serves, how good it is, and where it comes from."""

import html
from collections.abc import Mapping

import streamlit as st

from app.canvas.endings import version_of
from app.canvas.session import Visit
from app.canvas.texts import say
from app.client import ServiceClient

# Test figures of the papers, to stand beside ours. The protocol belongs to each.
PAPERS = {
    "mnist": "PixelRNN paper (arXiv:1601.06759): PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 nats; protocol "
    "static, so not the same task as dynamic.",
    "mnist5k": "No paper uses these 5,000 digits. The PixelRNN paper's PixelCNN has 81.30 nats on all of MNIST, with "
    "55,000 digits to learn from; protocol static.",
    "fashion_mnist": "No autoregressive figure is published. Glow has 2.958 bits/dim; protocol 8-bit.",
    "cifar10": "PixelCNN 3.14, PixelRNN 3.00 (arXiv:1601.06759), Gated PixelCNN 3.03 (arXiv:1606.05328) bits/dim; "
    "protocol 8-bit.",
}


def models_page(_: ServiceClient, visit: Visit) -> None:
    """Show what is served, dataset by dataset."""
    st.title(say("models_title"), anchor=False)
    st.markdown(say("models_intro"))
    for dataset, model in visit.models.items():
        with st.container(border=True):
            st.header(version_of({"name": dataset, **model.model}), anchor=False)
            channels, height, width = model.shape
            colour = " x 3" if channels == 3 else ""
            st.markdown(
                f"{model.architecture} · {height} x {width}{colour}, {model.levels} levels · protocol: {model.protocol}"
            )
            scores = model.scores
            if model.levels == 2 and "test/nll_nats" in scores:
                st.metric(f"test NLL ({model.protocol})", f"{scores['test/nll_nats']:.2f} nats")
            elif model.levels > 2 and "test/bits_per_dim" in scores:
                st.metric(f"test NLL ({model.protocol})", f"{scores['test/bits_per_dim']:.3f} bits/dim")
            if dataset in PAPERS:
                st.caption(say("beside", papers=PAPERS[dataset]))
            names = {"data hash": "data_hash", "git commit": "git_commit", "MLflow run": "run_id"}
            lineage = {name: model.model[key] for name, key in (names | {"weights sha256": "weights_sha256"}).items()}
            st.html(facts_html(lineage | {"promoted": model.promoted_at}))
            with st.expander(say("all_scores")):
                numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
                st.html(facts_html({name: f"{value:,.4g}" for name, value in sorted(numbers.items())}))


def facts_html(facts: Mapping[str, str]) -> str:
    """Return names and values as a table."""
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts">{"".join(rows)}</table>'
