"""The flow that scores the champions again: are they still what they were when they were promoted?"""

import tempfile
from pathlib import Path

from prefect import flow, get_run_logger

from pipelines import registry, tracking
from pipelines.params import DATASETS, check_dataset, load_params
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import load_dataset
from pixelcnn.training import evaluate, format_nll

EXPERIMENT = "evaluations"
DATA_FOLDER = Path("data")


@flow(name="evaluate-champions", persist_result=False)
def evaluate_champions(datasets: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Score the champion of each dataset on its validation and test images; each is a run in experiment `evaluations`.

    A dataset without champion or prepared data is passed over, with a line in the log.

    Args:
        datasets: their names; None for all.

    Returns:
        The scores by dataset.

    Raises:
        ValueError: a dataset is unknown.
        RuntimeError: at the end, naming the champions that could not be scored.
    """
    logger = get_run_logger()
    names = list(DATASETS) if datasets is None else datasets
    for name in names:
        check_dataset(name)
    scores, failures = {}, []
    for name in names:
        number = registry.aliases(name).get(tracking.CHAMPION)
        path = DATA_FOLDER / f"{name}.safetensors"
        if number is None or not path.exists():
            logger.info("%s: passed over, there is no %s", name, "champion" if number is None else path)
            continue
        try:
            scores[name] = _evaluate(name, number, path)
        except (ValueError, OSError) as error:  # one damaged champion does not hide the others
            failures.append(f"{name} version {number} ({error})")
    if failures:
        raise RuntimeError(f"these champions could not be scored: {'; '.join(failures)}")
    return scores


def _evaluate(name: str, number: str, path: Path) -> dict[str, float]:
    version = next(v for v in registry.versions(name) if v.version == number)
    data, params = load_dataset(path), load_params().evaluate
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_checkpoint(registry.download(version, Path(folder)))
    scores = evaluate(model, data, num_images=params.num_images or None, batch_size=params.batch_size)
    tags = {
        **version.lineage(),
        "dataset": name,
        "protocol": data.protocol,
        "evaluated_data_hash": data.data_hash,
    }
    tracking.log_evaluation(EXPERIMENT, f"{name}-v{number}", scores, tags)
    found = format_nll(scores["validation/nll_nats"], data.image_shape, data.num_levels)
    then = format_nll(version.recorded_nll, data.image_shape, data.num_levels)
    get_run_logger().info("%s version %s: validation %s, recorded in training %s", name, number, found, then)
    return scores
