"""What a visit remembers between redrawings of the page, and what it last heard of the service."""

import contextlib
import functools
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import streamlit as st

from app.canvas.drawing import Drawing, decode_drawing, parse_drawing, strength_of
from app.canvas.endings import Endings, Request, Settings, parse_seed
from app.canvas.photo import Layout, layout_of
from app.canvas.texts import language, say
from app.client import Likelihood, ServedModel, ServiceClient, ServiceError, service_url

MODELS_TTL_S = 5.0  # how long the list of served models is taken as current
RETRY_S = 5.0  # a service that does not answer is asked again after so long
NUM_MEASURED = 9  # images
GALLERY = 12  # past requests of a visit that are kept
NEW_SEEDS = 10**6  # short enough to be read out; a person may type longer ones


@dataclass
class Visit:
    """The state of a visit, beside the grid's ink, which is the component's, and what the widgets keep."""

    name: str  # for the service, which takes turns between visits
    client: ServiceClient  # by this name
    models: dict[str, ServedModel] = field(default_factory=dict)  # what is served, in the order to offer it
    models_at: float = -math.inf  # when it was asked
    models_missing: bool = False  # the service then had none to name, or gave no answer
    trouble: ServiceError | None = None  # what keeps an answer away
    retry_at: float = math.inf  # when to try again by itself
    pending: bool = False  # endings are wanted and have not come yet
    answered: Request | None = None  # the last request that has an answer, be it an error
    asked: Request | None = None  # the last request that was sent
    unanswered: bool = False  # it found no service, so it is to be sent again
    seed: int | None = None  # of this drawing's endings, until other ones are wanted
    gallery: list[Endings] = field(default_factory=list)  # the endings of this visit, the last ones first
    unfinished: Endings | None = None  # of a request that the next stroke has ended: shown until there is more
    settings: Settings | None = None  # last chosen to draw with
    order: str = "drawn"  # of the endings that are shown, see `order_of`
    language: str = field(default_factory=language)
    live: Endings | None = None  # endings that the browser got without the page: it has not shown them yet
    live_for: tuple[Any, int | None] | None = None  # the (query, seed) that the browser is getting endings of so
    stop_live: Callable[[], None] = lambda: None  # ends that
    drawn: dict[tuple[int, ...], str] = field(default_factory=dict)  # the grid's state, by shape; for the other pages
    linked: str = ""  # the drawing of the address that the visit began with
    example_wanted: bool = False
    example: tuple[Any, np.ndarray] | None = None  # ((dataset, shape), strengths) of the last picture to start from
    layouts: dict[str, Layout] = field(default_factory=dict)  # by the SHA-256 of the weights
    load: dict[tuple[int, ...], dict[str, str]] = field(default_factory=dict)  # {revision, ink} for the grid of a shape
    generate_wanted: bool = True
    generated: Endings | None = None  # the last sheet
    surprise: tuple[Any, Likelihood, list[float] | None] | None = None  # (question, answer, log_probs by label)

    def refresh_models(self) -> bool:
        """Ask what is served if the list is old; return whether that has changed.

        The last list stays in use while the service is away.
        """
        if time.monotonic() - self.models_at < MODELS_TTL_S:
            return False
        before = self.models
        try:
            served = self.client.models()
            # `mnist`, other handwritten digits, images in colour last.
            order = sorted(served, key=lambda one: (served[one].shape[0], one != "mnist", not one.startswith("mnist")))
            self.models = {one: served[one] for one in order}
            if self.models_missing:
                self.answer_came()
            if not self.models:
                raise ServiceError(say("operator_no_model"), away=True)
            self.models_missing = False
        except ServiceError as error:
            self.fail(error)
            self.models_missing = True
        self.models_at = time.monotonic()
        return self.models != before

    def layout(self, dataset: str) -> Layout:
        """Return how ink lies in a dataset's images, measured on some that its model makes. Raises ServiceError."""
        model = self.models[dataset]
        weights = str(model.model.get("weights_sha256"))
        if weights not in self.layouts:
            images = self.client.generate(dataset, num_samples=NUM_MEASURED, seed=0).images
            self.layouts[weights] = layout_of(strength_of(np.array(images), model.levels))
        return self.layouts[weights]

    def drawing(self, shape: tuple[int, ...]) -> Drawing:
        """Return what was last on the grid of a shape, as far as it is known here; at first what the address says."""
        kept = self.drawn.get(shape)
        return decode_drawing(self.linked, shape) if kept is None else parse_drawing(kept, shape)

    def fail(self, error: ServiceError) -> None:
        """Note what keeps an answer away, and when to ask again if that may help."""
        self.trouble = error
        self.retry_at = time.monotonic() + RETRY_S if error.away else math.inf

    @property
    def is_waiting(self) -> bool:
        """Whether the service is left alone for a moment, and then asked again."""
        return math.isfinite(self.retry_at)

    def answer_came(self) -> None:
        self.trouble, self.retry_at = None, math.inf

    def retry(self) -> None:
        """Have everything asked anew that has no answer, if it is still wanted."""
        self.trouble, self.models_at, self.retry_at = None, -math.inf, math.inf
        self.pending |= self.unanswered
        self.unanswered = False

    def want_endings(self) -> None:
        """Note that new endings are wanted. They still are if a stroke interrupts the page before they have come."""
        self.pending = True
        self.seed = None
        self.models_at = -math.inf

    def want_no_endings(self) -> None:
        """Want no endings after all; nor again for the same drawing as long as it is only live."""
        self.pending = False
        self.answered, self.unfinished = self.asked, None
        self.stop_live()

    def keep(self, ending: Endings) -> None:
        """Take up endings that have come: they are the last ones, and answer the last request."""
        self.gallery = [ending, *self.gallery][:GALLERY]
        self.answered, self.unfinished, self.unanswered = ending.request, None, False
        if self.live and self.live.drawing == ending.drawing:  # else they are newer: the page has yet to take them
            self.live = None
        self.answer_came()

    def take_live(self, drawing: str, settings: Settings) -> None:
        """Take up the endings that the browser got without the page, if they are those of this drawing."""
        ending = self.live
        if ending is None or self.pending or settings.seed not in (None, ending.seed):
            return
        if (ending.drawing, ending.settings) == (drawing, settings.query):
            self.keep(ending)
            if settings.seed is None:
                self.seed = ending.seed  # a grid that was blank when the page last saw it has none

    def is_ending(self, asked: Endings) -> bool:
        """Return whether what is to be ended is one of the endings that are shown, of another drawing.

        A whole drawing may well be an ending of itself: there is nothing to add.
        """
        image = np.maximum(asked.images[0], 0)  # as it is sent, 0 where unknown
        others = [one for one in (self.live, *self.gallery) if one and one.drawing != asked.drawing]
        return any(np.array_equal(image, one) for ending in others for one in ending.images)

    def own_seed(self) -> int:
        """Return the seed of this drawing, a new one if it has none: all that is drawn live then bends, not jumps."""
        if self.seed is None:
            self.seed = secrets.randbelow(NEW_SEEDS)
        return self.seed


client_of = functools.cache(ServiceClient)  # one for each address, shared by all visits
# By name, as long as their browsers have the page open. Only its browser is told a name: who knows it is that visit.
VISITS: WeakValueDictionary[str, Visit] = WeakValueDictionary()


def this_visit() -> Visit:
    """Return the state of this visit, at first as its address says. Raises ServiceError: the service has no address."""
    state, query, client = st.session_state, st.query_params, client_of(service_url())
    if "visit" in state:
        visit = cast(Visit, state.visit)
        visit.client = client.named(visit.name)
        return visit
    name = secrets.token_hex(8)
    visit = state.visit = VISITS[name] = Visit(name, client.named(name), linked=query.get("d", ""))
    for key, kind in (("dataset", str), ("known", str), ("label", int), ("temperature", float), ("n", int)):
        with contextlib.suppress(ValueError, KeyError):
            state[f"linked_{key}"] = kind(query[key])  # a default: what the browser's widgets hold comes first
    visit.seed, _ = parse_seed(query.get("seed", ""))
    visit.pending = visit.seed is not None and bool(visit.linked)  # the link to a picture: it is drawn at once
    return visit
