"""What the named environment says to the service and to the canvas, which know no pipeline.

`environments.yaml` of the working folder describes them, PIXELCNN_ENVIRONMENT names one; pipelines/settings.py reads
the same, and checks all of the file.
"""

import os
from pathlib import Path

import yaml

FILE = Path("environments.yaml")
VARIABLE = "PIXELCNN_ENVIRONMENT"
DEVELOPMENT = "development"  # what no file needs to describe: there the variables count


def setting(variable: str, field: str) -> str:
    """Return what a variable says, or in its place the named environment's `field`; empty for neither.

    Raises:
        LookupError: the file cannot be read, the environment is unknown or lacks it, or the variable says something
            else: nothing is mixed.
    """
    said = os.environ.get(variable, "").strip()
    name = os.environ.get(VARIABLE, "").strip() or DEVELOPMENT
    try:
        known = yaml.safe_load(FILE.read_text())
    except FileNotFoundError:
        known = {}
    except OSError as error:  # such as the folder that Docker makes where the file of a mount is missing
        raise LookupError(f"{FILE} cannot be read ({error.strerror}). Put the file there, or remove it.") from None
    except (yaml.YAMLError, UnicodeError):
        known = None
    if not (isinstance(known, dict) and all(isinstance(one, dict) for one in known.values())):
        raise LookupError(f"{FILE} must give each environment a registry, a store and, if there is one, a service.")
    if name not in known and name == DEVELOPMENT:
        return said
    if name not in known:
        raise LookupError(
            f"{VARIABLE} is {name!r}, which {FILE} in this folder does not describe. Known: "
            f"{', '.join(map(str, known)) or 'none'}. docs/operations.md shows what it says."
        )
    value = str(known[name].get(field) or "")
    if not value:
        raise LookupError(f"{FILE} says no {field} of {name}. Add it, or unset {VARIABLE}.")
    if said not in ("", value):
        raise LookupError(f"{variable} is set, but not to the {field} of {name}. Unset it, or {VARIABLE}.")
    return value
