"""The choice of what the model must keep, and what each means."""

from app.canvas.session import linked_default
from app.canvas.texts import say
from app.canvas.widgets import choose

MODES = ("above", "ink", "touched", "mask")
KNOWN_KEYS = ("known", "known_all", "known_paint")  # where the mode is kept
PAINT_MODES = ("ink", "above", "mask")  # in colour no cell is blank: painted black, or not painted


def known_key(painting: bool, sees_all: bool) -> str:
    """Return where the mode is kept: apart for each default."""
    by_drawing, by_whole_drawing, by_paint = KNOWN_KEYS
    return by_paint if painting else by_whole_drawing if sees_all else by_drawing


def choose_known(painting: bool, sees_all: bool) -> str:
    """Show what may count as known; return the chosen mode of `app.canvas.drawing.known_cells`.

    Args:
        sees_all: the model takes into account what is known below a cell, too: then no rows need to be above others.
    """
    modes, key = PAINT_MODES if painting else MODES, known_key(painting, sees_all)
    names = {mode: say("known_paint" if painting and mode == "ink" else f"known_{mode}") for mode in modes}
    default = linked_default("known", key, modes, "ink" if painting or sees_all else "above")
    return choose(say("known"), names, default, width="stretch", wrap=True, key=key, persist_state="session")


def known_help(mode: str, painting: bool, sees_all: bool) -> str:
    """Return a sentence on what counts as known, in this mode and for such a model."""
    if painting:
        return say("help_paint" if mode == "ink" else f"help_paint_{mode}")
    return say("help_ink_seen" if mode == "ink" and sees_all else f"help_{mode}")
