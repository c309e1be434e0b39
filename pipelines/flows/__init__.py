"""Prefect's flows. In their logs, too, a person's mistake is one sentence, without a traceback."""

import logging

from pipelines.errors import one_line

for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(one_line)
