"""What a flow run shows in Prefect's pages: tags, a table of scores, pictures, a decision; and how it is cancelled."""

import base64
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run as this_run

from pipelines.registry import runs as tracking
from pipelines.registry.decisions import Report
from pipelines.stages.live_run import RUN_ID_FILE
from pixelcnn.checkpoint import SCORES_FILE

DEPLOYMENTS_FOLDER = Path("models/deployments")
PICTURES = ("samples.png", "completions.png", "curve.png")


def artifact_key(kind: str, name: str) -> str:
    """Return the key of an artifact: small letters, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", f"{kind}-{name}".lower())


def tag_run(*tags: str) -> None:
    """Add tags to the flow run under way: its pages can be filtered by them."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(this_run.get_id()), tags={*this_run.get_tags(), *tags})


def show_scores(name: str, protocol: str, scores: Mapping[str, Any]) -> None:
    """Show the numbers among scores as the table `scores-NAME` of the flow run under way."""
    rows = [{"score": key, "value": value} for key, value in scores.items() if isinstance(value, int | float)]
    create_table_artifact(rows, key=artifact_key("scores", name), description=f"Scores of {name}, protocol {protocol}.")


def show_training(pair: str, out: Path, report: Path, version: str) -> None:
    """Show what a training came to in the flow run under way: its scores, and those of `PICTURES` that are there."""
    scores = json.loads((out / SCORES_FILE).read_text())
    show_scores(pair, scores["protocol"], scores)
    for file in (report / name for name in PICTURES if (report / name).exists()):
        data = base64.b64encode(file.read_bytes()).decode()
        text = f"{file.stem} of {pair}, version {version} in MLflow"
        create_image_artifact(f"data:image/png;base64,{data}", key=artifact_key(file.stem, pair), description=text)


def show_decision(report: Report) -> None:
    """Show a decision of a flow run as the text `decision-DATASET`: what, why, and the intervals in nats."""
    lines = [report["text"], "", "| difference | mean | low | high |", "| --- | --- | --- | --- |"]
    for name in ("total_difference", "joint_difference", "completion_difference"):
        if found := report.get(name):
            lines.append(f"| {name} | {found['mean']:+.3f} | {found['low']:+.3f} | {found['high']:+.3f} |")
    text = "\n".join(lines if len(lines) > 4 else lines[:1])
    create_markdown_artifact(text, key=artifact_key("decision", report["dataset"]), description=report["decision"])


def remove_cancelled(flow: Any, flow_run: Any, state: Any) -> None:
    """Show the trainings of a cancelled run as KILLED in MLflow, and remove the folder that was made for the run."""
    folder = DEPLOYMENTS_FOLDER / str(flow_run.id)
    try:
        for file in folder.rglob(RUN_ID_FILE):
            tracking.client().set_terminated(file.read_text(), "KILLED")
    finally:  # MLflow may be away
        shutil.rmtree(folder, ignore_errors=True)
