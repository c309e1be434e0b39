"""All texts of the canvas, in `texts.yaml`, each in English and in French; the browser's language chooses."""

from contextvars import ContextVar
from pathlib import Path

import streamlit as st
import yaml

LANGUAGES = ("en", "fr")
TEXTS: dict[str, list[str]]
FRENCH_LABELS: dict[str, str]
TEXTS, FRENCH_LABELS = yaml.safe_load_all(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
SPOKEN: ContextVar[str] = ContextVar("spoken")  # where no page runs, which knows its browser


def language() -> str:
    """Return the language to show: the browser's if the canvas speaks it, else English."""
    if spoken := SPOKEN.get(""):
        return spoken
    found = (st.context.locale or "")[:2].lower()
    return found if found in LANGUAGES else LANGUAGES[0]


def say(key: str, **values: object) -> str:
    """Return a text in the language to show, with values in its {places}."""
    return TEXTS[key][LANGUAGES.index(language())].format(**values)


def say_label(name: str) -> str:
    """Return a label as the service names it in the language to show, where the canvas knows it."""
    return FRENCH_LABELS.get(name, name) if language() == "fr" else name
