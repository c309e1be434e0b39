"""The page of surprise: nats per pixel."""

import functools
import html
from collections.abc import Iterable
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from app.canvas.drawing import TOUCHED, Drawing, encode_drawing, levels_of
from app.canvas.endings import bits_per_dim, nats, shape_of, version_of
from app.canvas.examples import real_images
from app.canvas.rendering import heat_pixels, img, png_size, whole_pixels
from app.canvas.session import Visit
from app.canvas.texts import say, say_label
from app.canvas.waiting import once, wait_for
from app.canvas.widgets import choose_dataset, choose_label, companion, in_words, show_trouble, upload_picture
from app.client import Likelihood, ServedModel, ServiceError


def surprise_page(visit: Visit) -> None:
    """Show where an image surprises the model, and which label explains it best."""
    st.markdown(say("surprise_intro"))
    left, right = st.columns([9, 21], gap="medium")
    with left:
        dataset = choose_dataset(visit.models)
        model = visit.models[dataset]
        shape = shape_of(model)
        strength, trouble = upload_picture(say("own_picture"), visit, dataset)
        label = choose_label(model.labels, say("told"))
        drawing = visit.drawing(shape)
        link: dict[str, str | int] = {}
        if strength is None and not trouble and drawing.mark.any():
            # The grid is on another page: after a reload the address alone knows what was drawn.
            link = {"dataset": dataset, "label": label, "d": encode_drawing(drawing)}
        companion(urlencode(link))  # always there, for the upload
    with right:
        if trouble:
            st.warning(trouble)
            return
        examples = [one for one in real_images(dataset) if one.shape == shape]  # see `board`
        is_example = strength is None and not drawing.mark.any() and bool(examples)
        if is_example:
            strength = examples[0]
        if strength is not None:
            drawing = Drawing(strength, np.full(shape[:2], TOUCHED))
        image = levels_of(drawing, model.levels)
        question = (dataset, model.model.get("weights_sha256"), image.tolist(), label)
        if not visit.surprise or visit.surprise[0] != question:
            ask = functools.partial(visit.client.likelihood, dataset, image.tolist(), label=label)
            try:
                [answer] = wait_for(once(ask), "surprise", say("scoring"))
                visit.surprise = (question, answer, None)
                visit.answer_came()
            except ServiceError as error:
                visit.fail(error)
                show_trouble(visit)
                return
        _, answer, by_label = visit.surprise
        surprise = np.array(answer.surprise)
        sent = img(whole_pixels(image, model.levels), say("sent"))
        heat = img(heat_pixels(surprise), say("heat_map"))
        scale = f'<span>0</span><i class="heat"></i><span>{surprise.max():.1f} nats</span>'
        st.html(
            f'<div class="pair"><figure>{sent}<figcaption>{say("as_sent")}</figcaption></figure>'
            f"<figure>{heat}<figcaption>{scale}</figcaption></figure></div>"
        )
        if is_example:
            st.caption(say("example_scored"))
        elif not drawing.mark.any():
            st.caption(say("nothing_scored"))
        first, second, third = st.columns(3)
        first.metric(say("log_probability"), nats(answer.log_prob))
        second.metric(say("per_dimension"), bits_per_dim(answer.log_prob, image.size))
        if "test/nll_nats" in model.scores:
            third.metric(say("usual"), nats(-model.scores["test/nll_nats"]))
        st.caption(say("packed", packed=answer.packed_bytes, png=png_size(image, model.levels)))
        if model.labels and st.button(say("which_label"), icon=":material/label:"):
            try:
                given = likelihoods(visit, dataset, [image], range(len(model.labels)), "labels")
                by_label = [one.log_prob for one in given]
                visit.surprise = (question, answer, by_label)
            except ServiceError as error:
                st.warning(in_words(error))
        if by_label:
            st.html(labels_html(model.labels, by_label))
        st.caption(say("by", model=version_of(answer.model)))


def likelihoods(
    visit: Visit, dataset: str, images: Iterable[np.ndarray], labels: Iterable[int], what: str
) -> list[Likelihood]:
    """Return how likely images are, (H, W) or (H, W, 3) levels, each given each label. Raises ServiceError.

    For `what` see `busy_line`; a toggle of this key is off once that was stopped.
    """
    asked = (visit.client.likelihood(dataset, image.tolist(), label=label) for image in images for label in labels)
    switch_off = functools.partial(st.session_state.update, {what: False})
    return wait_for(lambda _: asked, what, say("asking"), switch_off)


def surprise_beside(visit: Visit, dataset: str, model: ServedModel, image: np.ndarray) -> None:
    """Show beside the grid which label explains an image's levels, where they surprise, how likely each pixel is."""
    question = (dataset, model.model.get("weights_sha256"), image.tolist(), -1)
    if not visit.surprise or visit.surprise[0] != question or (model.labels and visit.surprise[2] is None):
        if visit.is_waiting:
            return
        try:
            answer, *given = likelihoods(visit, dataset, [image], range(-1, len(model.labels)), "surprise_beside")
            visit.surprise = (question, answer, [one.log_prob for one in given] or None)
            visit.answer_came()
        except ServiceError as error:
            visit.fail(error)
            return
    _, answer, by_label = visit.surprise
    table = labels_html(model.labels, by_label, most=5) if by_label else ""
    st.html(f'<div class="beside">{map_html(np.array(answer.surprise))}<div>{table}</div></div>')
    st.caption(say("tap_pixel"))


def map_html(surprise: np.ndarray) -> str:
    """Return (H, W) nats as a map whose pixels say, when pointed at or tapped, how likely each was."""
    cells = [
        f'<i style="background: rgb{tuple(colour)}" data-p="{100 * np.exp(-nats):.3g} %"></i>'
        for colour, nats in zip(heat_pixels(surprise).reshape(-1, 3).tolist(), surprise.ravel(), strict=True)
    ]
    label, width = html.escape(say("heat_map")), surprise.shape[1]
    return f'<div class="map" role="img" aria-label="{label}" style="--width: {width}">{"".join(cells)}</div>'


def labels_html(names: list[str], log_probs: list[float], most: int = 1000) -> str:
    """Return what each label makes of an image: its log-probability, and the label's share if all are as likely."""
    scores = np.array(log_probs)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    rows = [
        f"<tr><th>{html.escape(say_label(names[i]))}</th><td>{nats(scores[i])}</td>"
        f'<td><i style="width: {100 * shares[i]:.1f}%"></i></td><td>{100 * shares[i]:.0f} %</td></tr>'
        for i in np.argsort(-scores)[:most]
    ]
    return f'<table class="labels">{"".join(rows)}</table>'
