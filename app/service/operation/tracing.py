"""Traces, sent by BentoML's own OpenTelemetry where the environment names a collector; otherwise none are made."""

import importlib.util
import os
from typing import Any

from bentoml.exceptions import BentoMLConfigException

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
QUIET = "livez,readyz,healthz,metrics"


def tracing() -> dict[str, Any]:
    """Return the service's setting `tracing`.

    The variables are OpenTelemetry's: an endpoint switches it on, OTEL_TRACES_SAMPLER_ARG is the share of requests.

    Raises:
        BentoMLConfigException: an endpoint is set, and what sends traces is not installed.
    """
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return {"excluded_urls": ".*"}
    # Names from the top: the parent of a module that is looked for is imported.
    if not all(importlib.util.find_spec(name) for name in ("opentelemetry.exporter", "opentelemetry.exporter.otlp")):
        raise BentoMLConfigException(
            f"{endpoint} is set: pip install opentelemetry-exporter-otlp-proto-http, or unset it."
        )
    share = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG") or 1)
    return {"exporter_type": "otlp", "sample_rate": share, "excluded_urls": QUIET, "otlp": {"protocol": "http"}}
