"""Traces, sent by BentoML's own OpenTelemetry where the environment names a collector; otherwise none are made."""

import importlib.util
import math
import os
from typing import Any

from bentoml.exceptions import BentoMLConfigException

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SHARE = "OTEL_TRACES_SAMPLER_ARG"
QUIET = "livez,readyz,healthz,metrics"


def tracing() -> dict[str, Any]:
    """Return the service's setting `tracing`.

    The variables are OpenTelemetry's: an endpoint switches it on, `SHARE` is the share of requests, all by default.

    Raises:
        BentoMLConfigException: an endpoint is set, but the share is no number from 0 to 1, or the exporter is missing.
    """
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return {"excluded_urls": ".*"}
    # Names from the top: the parent of a module that is looked for is imported.
    if not all(importlib.util.find_spec(name) for name in ("opentelemetry.exporter", "opentelemetry.exporter.otlp")):
        raise BentoMLConfigException(
            f"{endpoint} is set: pip install opentelemetry-exporter-otlp-proto-http, or unset it."
        )
    text = os.environ.get(SHARE) or "1"
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise BentoMLConfigException(f"{SHARE} must be a number from 0 to 1, got {text!a}. Set it anew.")
    return {"exporter_type": "otlp", "sample_rate": share, "excluded_urls": QUIET, "otlp": {"protocol": "http"}}
