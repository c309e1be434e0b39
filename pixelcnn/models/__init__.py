"""The architectures, one file each; importing this package registers them all.

So it does those of further modules, named with commas between them in the environment variable PIXELCNN_ARCHITECTURES.
"""

import importlib
import os
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
for _name in filter(None, map(str.strip, os.environ.get("PIXELCNN_ARCHITECTURES", "").split(","))):
    try:
        importlib.import_module(_name)
    except ImportError as error:
        advice = "unset it, or set PYTHONPATH to the folder of that file"
        if error.name == "pixelcnn":  # which is being imported
            advice = "there import from pixelcnn.models and the other modules, not from pixelcnn itself"
        raise ImportError(
            f"PIXELCNN_ARCHITECTURES names {_name!r}, which cannot be imported ({error}): {advice}."
        ) from None
