"""Not a stage of DVC's: the judges of a dataset are made once, and lie in git like the released weights."""

import logging

from pipelines.judging.judge import JUDGES, judge_file, save_judge, train_judge
from pipelines.stages.train import load

logger = logging.getLogger(__name__)


def judge(dataset: str) -> None:
    """Train the judges of a dataset.

    Raises:
        ValueError: its prepared file is missing or damaged, or it has no labels.
    """
    data = load(dataset)
    if not data.label_names:
        raise ValueError(f"{dataset} has no labels, and a judge learns what is an image of it by telling them apart.")
    for which, config in JUDGES.items():
        save_judge(judge_file(dataset, which), train_judge(data, config, logger.info))
        logger.info("wrote %s", judge_file(dataset, which))
