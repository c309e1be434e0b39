"""The service and the canvas, two programs; see app/service and app/canvas."""

import sys
from pathlib import Path

# `bentoml serve pixelcnn:latest` looks for a module pixelcnn before it looks for the Bento. One that is installed must
# not stand in for the Bento's own, which lies beside this folder.
_found = getattr(sys.modules.get("pixelcnn"), "__file__", None)
if _found and Path(_found).resolve().parents[1] != Path(__file__).resolve().parents[1]:
    for _name in [name for name in sys.modules if name.partition(".")[0] == "pixelcnn"]:
        del sys.modules[_name]
