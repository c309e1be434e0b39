"""Prefect's flows. In their logs, too, a person's mistake is one sentence, without a traceback."""

import logging
import os

from pipelines.errors import one_line

# Read when prefect is imported. Its default, 180, is longer than the silence after which automations.yaml takes a run
# for a crashed one: one that somebody starts by hand has no worker to tell it.
os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")

for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(one_line)
