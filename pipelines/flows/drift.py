"""The flow that asks the service whether people draw what its champions were promoted for, and does what was chosen."""

from typing import Any, Literal

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.deployments import run_deployment
from pydantic import BaseModel, TypeAdapter

from pipelines.errors import reason, without_passwords
from pipelines.flows.evaluate import client_of
from pipelines.flows.shown import artifact_key, tag_run
from pipelines.registry import versions as registry
from pipelines.settings import Settings, in_prefect

TIMEOUT_S = 10.0  # nothing is computed for it


class Told(BaseModel):
    """What the service tells of a dataset's drawings."""

    version: str
    watched: bool
    drifted_since: str | None
    drift: dict[str, dict[str, Any]]  # by statistic


@flow(name="watch-drift", persist_result=False)
def watch_drift(
    action: Literal["report", "retrain", "nothing"] = "report", service_url: str | None = None
) -> dict[str, list[str]]:
    """Ask the service which statistics of what is drawn have drifted, and return them by dataset.

    See app/service/operation/drift.py.

    Args:
        action: `report` writes the table `drift-DATASET` and a warning; `retrain` also starts a training of the
            champion's pair, once for each time that drift begins; `nothing` does nothing.
        service_url: None for the environment's PIXELCNN_SERVICE_URL.

    Raises:
        LookupError: no service is named.
        ConnectionError: it does not answer.
    """
    url = service_url or Settings().service_url
    if not url:
        raise LookupError("no service is named: set service_url, or PIXELCNN_SERVICE_URL where the worker runs")
    where = without_passwords(url)
    try:
        with client_of(url) as http:
            answer = http.get("/drawings", timeout=TIMEOUT_S)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ConnectionError(f"the service at {where} asks for a token: set PIXELCNN_TOKEN to its own")
        drawn = TypeAdapter(dict[str, Told]).validate_json(answer.raise_for_status().content)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # another page is not the service's
        raise ConnectionError(f"the service at {where} does not tell of drawings ({reason(error)})") from error
    tag_run(*drawn)
    for dataset, told in drawn.items():
        if action != "nothing" and not told.watched:
            text = "drawings of %s are not watched: version %s came without a reference, or with too small a one"
            get_run_logger().warning(text, dataset, told.version)
    drifted = {dataset: told for dataset, told in drawn.items() if told.drifted_since}
    unknown: list[str] = []
    for dataset, told in drifted.items():
        if action != "nothing":
            get_run_logger().warning("drawings of %s have drifted since %s", dataset, told.drifted_since)
            rows = [{"statistic": name, **values} for name, values in told.drift.items()]
            text = f"Drawings against the reference of version {told.version}, since {told.drifted_since}."
            create_table_artifact(rows, key=artifact_key("drift", dataset), description=text)
        if action == "retrain":
            try:
                _retrain(dataset, told.version, str(told.drifted_since))
            except LookupError as error:  # the others are told of and trained
                unknown.append(str(error))
    if unknown:
        raise LookupError(" ".join(unknown))
    return {dataset: [name for name, one in told.drift.items() if one["drifted"]] for dataset, told in drifted.items()}


def _retrain(dataset: str, number: str, since: str) -> None:
    champion = next((version for version in registry.versions(dataset) if version.version == number), None)
    if champion is None:
        raise LookupError(
            f"the service has version {number} of {dataset}, which this registry has not: set "
            "MLFLOW_TRACKING_URI to the one that feeds it. No training was asked for."
        )
    # The key is Prefect's: a run that was asked for by it is not made again.
    run_deployment(
        f"train-pair/{in_prefect('train-pair')}",
        parameters={"pair": champion.tags["pair"], "reuse": False},
        timeout=0,
        idempotency_key=f"drift-{dataset}-{since}",
        as_subflow=False,
    )
    get_run_logger().info("a training of %s is asked for: promote %s once it is done", champion.tags["pair"], dataset)
