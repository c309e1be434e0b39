"""The canvas of an installed package, where there is no folder to run it from: `python -m app.canvas`."""

import sys
from pathlib import Path

from streamlit.web.cli import main

# As in .streamlit/config.toml, which an installed package lacks.
SETTINGS = ["--server.address=127.0.0.1", "--server.headless=true", "--browser.gatherUsageStats=false"]

if __name__ == "__main__":
    sys.argv = ["streamlit", "run", str(Path(__file__).with_name("main.py")), *SETTINGS, *sys.argv[1:]]
    main()
