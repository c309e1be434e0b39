"""The page at `/`, in place of BentoML's: that one has a browser load programs from elsewhere."""

from fastapi.responses import HTMLResponse

PATHS = {
    "/models": "what is served",
    "/docs.json": "how to ask: OpenAPI",
    "/readyz": "whether it is ready",
    "/metrics": "its figures, for Prometheus",
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>PixelCNN service</title>
<h1>PixelCNN service</h1>
<p>It completes, generates and scores images over HTTP; the canvas is a program of its own.</p>
<ul>{links}</ul>
</html>
"""


def page() -> HTMLResponse:
    """Return the page; a browser that shows it loads nothing else."""
    links = "".join(f'<li><a href="{path[1:]}">{path}</a>: {text}</li>' for path, text in PATHS.items())
    return HTMLResponse(PAGE.format(links=links), headers={"Content-Security-Policy": "default-src 'none'"})
