"""The Prefect flows that move champions: promote on evidence, roll back on demand."""

import json
from contextlib import suppress

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.files import atomic_write
from pipelines.flows.shown import show_decision, tag_run
from pipelines.params import load_params
from pipelines.promotion.move import UnfinishedMoveError, explained, run_promotion, run_rollback
from pipelines.promotion.register import copy_served, register_trained, repair
from pipelines.promotion.rule import Candidate
from pipelines.promotion.score import score
from pipelines.registry import versions as registry
from pipelines.registry.decisions import FAILED, Report
from pipelines.registry.versions import Version
from pipelines.reports.comparison import PROMOTIONS_FOLDER
from pipelines.stages.train import load
from pixelcnn.data import Dataset
from pixelcnn.evaluation import format_nll


def _write_report(report: Report) -> None:
    text = json.dumps(report, indent=2, allow_nan=False)
    atomic_write(PROMOTIONS_FOLDER / f"{report['dataset']}.json", text + "\n")


def _shown(report: Report) -> Report:
    print(report["text"])
    show_decision(report)
    return report


@task(name="score", persist_result=False, cache_policy=NO_CACHE)
def _score(version: Version, data: Dataset, batch_size: int) -> Candidate:
    scores = score(version, data, batch_size)
    mean = format_nll(scores.joint_nats.mean().item(), data.image_shape, data.num_levels)
    get_run_logger().info("version %s: validation %s, protocol %s", version.version, mean, data.protocol)
    return scores


@flow(name="promote", persist_result=False, log_prints=True)
def promote(
    dataset: str, dry_run: bool = False, version: int | None = None, why: str | None = None, to: str | None = None
) -> Report:
    """Let the best registered version of a dataset become champion, if it is better beyond doubt.

    Checkpoints in models/ that the registry does not know are registered first. The report is written to
    reports/promotions/DATASET.json in any case but a dry run.

    Args:
        dry_run: decide and say so, but move, register and record nothing.
        version: the one that competes, even if it was rolled back; None for all.
        why: the reason to record, beside who asked.
        to: an environment, which is to serve what this one serves; nothing else is done then.

    Raises:
        ValueError: the dataset is unknown, or its prepared file is missing or damaged.
        LookupError: nothing is registered, or no such version, or another registry feeds the model store.
        OSError: the registry, the store or a disk failed; the text says whether anything was carried out in part.
    """
    tag_run(dataset)
    if to is not None:
        if dry_run or version is not None:
            raise ValueError("`to` copies what is served here: it takes neither `version` nor `dry_run`.")
        registry.check_known(dataset)
        return _shown(copy_served(dataset, to, why))
    params = load_params()
    params.dataset(dataset)
    registered: list[str] = []
    try:
        data = load(dataset)
        if not dry_run:
            # A registry that was lost and begun anew goes on with the champion that is served.
            try:
                if not registry.champion(dataset):
                    registered += repair(dataset)
            except ValueError:  # what is served is damaged, and the error says to promote another one
                if version is None:
                    raise
            registered += register_trained(dataset)
        report = run_promotion(dataset, data, params.promote, _score, dry_run, version, why)
    except Exception as error:
        cause = explained(error)
        text = f"{dataset}: {'' if isinstance(error, UnfinishedMoveError) else 'nothing new moved: '}{cause}"
        if not dry_run:
            with suppress(OSError):  # a disk that is full, too, would hide what this tells
                _write_report({"dataset": dataset, "decision": FAILED, "reason": cause, "text": text})
        if isinstance(error, (LookupError, ValueError)):
            raise
        raise OSError(text) from error
    report["text"] = " ".join([*registered, report["text"]])
    print(report["text"])  # first: the report may fail, and nothing else says that the champion has moved
    if not dry_run:
        _write_report(report)
        show_decision(report)
    return report


@flow(name="rollback", persist_result=False, log_prints=True)
def rollback(dataset: str, to: int | None = None, why: str | None = None) -> Report:
    """Make an earlier champion of a dataset the champion again; see `pipelines.promotion.move.run_rollback`.

    Args:
        to: a version that was champion; None for the one before the present champion.
        why: the reason to record, beside who asked.
    """
    registry.check_known(dataset)
    tag_run(dataset)
    return _shown(run_rollback(dataset, to, why))
