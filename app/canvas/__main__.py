"""The canvas of an installed package, where there is no folder to run it from: `python -m app.canvas`."""

import sys
from pathlib import Path

from streamlit.web.cli import main

if __name__ == "__main__":
    sys.argv = ["streamlit", "run", str(Path(__file__).with_name("main.py")), *sys.argv[1:]]
    main()
