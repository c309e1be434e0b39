"""The flow that scores the champions again: are they still what they were when they were promoted?

The model is scored twice: as the registry has it, in this process; and as the service answers, over HTTP, if its
address is set. Whatever differs from the registered score is a failed run.
"""

import time
from typing import Annotated, Any

import httpx
from prefect import flow, get_run_logger
from pydantic import Field

from pipelines.errors import reason_or_raise, without_passwords
from pipelines.flows.shown import show_scores, tag_run
from pipelines.params import EVALUATIONS_EXPERIMENT, load_params
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.provenance import prepared_file
from pipelines.registry.versions import TOLERANCE_NATS, Version, check_scores
from pipelines.settings import Settings
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import CHECKED_IMAGES, CHECKED_SCORE, evaluate, format_nll

SERVICE_TIMEOUT_S = 60.0
BUSY = (429, 503)
MAX_S = 1800.0  # for all champions; a run that takes longer is TimedOut, a failure
MAX_BUSY_S = 120.0  # that one request waits for a busy service, in all


@flow(name="evaluate-champions", persist_result=False, timeout_seconds=MAX_S)
def evaluate_champions(
    datasets: list[str] | None = None, service_url: str | None = None, num_images: Annotated[int, Field(ge=1)] = 500
) -> dict[str, dict[str, float]]:
    """Score the champion of each dataset on its validation and test images; each is a run in experiment `evaluations`.

    A dataset without champion or prepared data is passed over, with a line in the log. Returns the scores by dataset.

    Args:
        datasets: their names; None for all.
        num_images: of each split, the first so many, fewer where `params.yaml` says so. Whole test sets take minutes.
        service_url: of the service, which then scores its champion on the first test images, too; None for the
            environment's PIXELCNN_SERVICE_URL, and without that the service is not asked.

    Raises:
        ValueError: a dataset is unknown; or, at the end, naming the champions that do not score what was registered, or
            could not be scored.
    """
    logger = get_run_logger()
    params = load_params()
    names = list(params.datasets) if datasets is None else datasets
    for name in names:
        params.dataset(name)
    url = service_url or Settings().service_url or None
    if url is None:
        logger.info("the service is not asked: set service_url or PIXELCNN_SERVICE_URL for that")
    champions: dict[str, Version] = {}
    for name in names:
        champion, path = registry.champion(name), prepared_file(name)
        if champion is not None and path.exists():
            champions[name] = champion
        else:
            logger.info("%s: passed over, there is no %s", name, "champion" if champion is None else path)
    tag_run(*champions)
    scores: dict[str, dict[str, float]] = {}
    failures: list[str] = []
    for name, champion in champions.items():
        try:
            scores[name] = _evaluate(name, champion, url, num_images)
        except Exception as error:  # one damaged champion does not hide the others
            failures.append(f"{name} version {champion.version} ({reason_or_raise(error)})")
    if failures:
        text = "these champions do not score what was registered, or could not be scored: "
        raise ValueError(text + "; ".join(failures))
    return scores


def _evaluate(name: str, version: Version, url: str | None, num_images: int) -> dict[str, float]:
    data, params = load_dataset(prepared_file(name)), load_params().evaluate
    model, recorded = registry.load(version)
    num_images = min(params.num_images or num_images, num_images)
    scores = evaluate(model, data, num_images=num_images, batch_size=params.batch_size)
    tags = {**version.lineage(), "dataset": name, "protocol": data.protocol, "evaluated_data_hash": data.data_hash}
    show_scores(name, data.protocol, scores)
    run_id = tracking.log_evaluation(EVALUATIONS_EXPERIMENT, f"{name}-v{version.version}", scores, tags)
    found = format_nll(scores["validation/nll_nats"], data.image_shape, data.num_levels)
    then = format_nll(version.recorded_nll, data.image_shape, data.num_levels)
    get_run_logger().info(
        "%s version %s, protocol %s: validation %s, of the first %d images; registered with %s",
        *(name, version.version, data.protocol, found, scores["validation/num_images"], then),
    )
    if data.data_hash != version.lineage()["data_hash"]:
        get_run_logger().warning("%s: the data are not those it was registered with: not compared", name)
        return scores
    check_scores(str(version), model, recorded, data)
    if url is not None:
        nats = recorded[CHECKED_SCORE]
        try:
            served = score_through_service(url, name, version.version, data, CHECKED_IMAGES)
        except ValueError:
            if registry.aliases(name).get(tracking.CHAMPION) == version.version:
                raise
            get_run_logger().info("%s is champion no more: the service is not compared", version)
            return scores
        tracking.client().log_metric(run_id, f"service/{CHECKED_SCORE.replace('/', '_')}", served)
        where = without_passwords(url)
        if not abs(served - nats) <= TOLERANCE_NATS:
            raise ValueError(
                f"the service at {where} scores {served:.2f} nats on up to {CHECKED_IMAGES} test images, "
                f"registered are {nats:.2f}: restart it, and if that does not help, promote {name} again"
            )
        get_run_logger().info("%s: the service at %s scores %.2f nats, registered %.2f", name, where, served, nats)
    return scores


def client_of(url: str) -> httpx.Client:
    """Return a client of the service, with its token, or with the name and password that are in the address.

    As a neighbour it is never asked by way of a proxy. httpx's errors and log lines hold the address that it is given.
    """
    token, address = Settings().token, httpx.URL(url)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    auth = httpx.BasicAuth(address.username, address.password) if address.userinfo and not token else None
    base = address.copy_with(userinfo=b"")
    return httpx.Client(base_url=base, timeout=SERVICE_TIMEOUT_S, trust_env=False, headers=headers, auth=auth)


def score_through_service(url: str, dataset: str, version: str, data: Dataset, num: int) -> float:
    """Let the service score the first `num` test images; return their mean NLL in nats per image.

    Raises:
        ValueError: another version than `version` answers.
        ConnectionError: the service cannot be reached, or refuses.
    """
    levels = data.levels("test", slice(0, num))  # (N, C, H, W)
    images = levels[:, 0] if data.image_shape[0] == 1 else levels.permute(0, 2, 3, 1)
    total, where = 0.0, without_passwords(url)
    try:
        with client_of(url) as http:
            for image in images.tolist():
                answer = _post(http, "/likelihood", {"dataset": dataset, "image": image})
                if answer.status_code == 401:
                    raise ConnectionError(f"the service at {where} asks for a token: set PIXELCNN_TOKEN to its own")
                if answer.status_code != 200:
                    raise ConnectionError(f"the service at {where} answered {answer.status_code}: {answer.text}")
                try:
                    body = answer.json()
                    served, log_prob = str(body["model"]["version"]), float(body["log_prob"])
                except (ValueError, LookupError, TypeError):  # a proxy's page for people to log in, say
                    raise ConnectionError(f"what answers at {where} is not the service: name its address") from None
                if served != version:
                    raise ValueError(
                        f"the service at {where} answers with version {served}: point it to the model store of this "
                        "pipeline (BENTOML_HOME)"
                    )
                total -= log_prob
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(
            f"the service at {where} cannot be reached ({error}): start it with make serve, or name none "
            "(service_url, PIXELCNN_SERVICE_URL)"
        ) from error
    return total / len(images)


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Ask the service, and again after as long as it asks for while it is busy, `MAX_BUSY_S` in all."""
    deadline = time.monotonic() + MAX_BUSY_S
    while True:
        answer = http.post(path, json=body)
        if answer.status_code not in BUSY:
            return answer
        text = answer.headers.get("retry-after", "")
        wait_s = float(text) if text.isdecimal() else 1.0
        if time.monotonic() + wait_s > deadline:
            return answer
        time.sleep(wait_s)
