"""Where a training comes from: the state of the code, and the prepared data that DVC recorded."""

import hashlib
import subprocess
from pathlib import Path

import pixelcnn
from pipelines.files import read_lock
from pixelcnn.models.registry import architectures, files_beside

LOCK_FILES = ("dvc.lock", "full/dvc.lock", "own/dvc.lock")
# DVC writes its lock during a stage, and removes a stage's metrics that git tracks before it runs the stage.
_WRITTEN_BY_DVC = (":(exclude,glob)**/dvc.lock", ":(exclude,glob)reports/*/metrics.json")
_CODE = ("pixelcnn/*.py", "pipelines/*.py", "app/*.py")  # git's * crosses folders


def git_state() -> dict[str, str]:
    """Return `git_commit` and `git_dirty` of the project in the current folder; both `unknown` outside a repository.

    `true` is dirty: a tracked file was changed, what DVC writes aside, or a Python module was added to the packages, or
    beside them as an architecture of one's own.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN_BY_DVC)
        beside = [file for name in architectures() for file in files_beside(name)]
        own = [str(file) for file in beside if file.is_relative_to(Path.cwd())]
        added = git("ls-files", "--others", "--exclude-standard", "--", *_CODE, *own)
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(bool(changed or added)).lower()}


def prepared_file(dataset: str) -> Path:
    """Return where a dataset's prepared file lies, from the project's folder."""
    return Path("data") / f"{dataset}.safetensors"


def recorded_hash(dataset: str) -> str | None:
    """Return the MD5 of a prepared file as a `dvc.lock` records it; None if none does. ValueError as `read_lock`."""
    recorded = (read_lock(Path(path), "stages", f"prepare@{dataset}", "outs", 0, "md5") for path in LOCK_FILES)
    return next((str(md5) for md5 in recorded if md5 is not None), None)


def core_sha256(*parts: str) -> str:
    """Return one SHA-256 of the modules of `pixelcnn/`, or of some files and folders of it."""
    package = Path(pixelcnn.__file__).parent
    tops = [package / part for part in parts] or [package]
    code = hashlib.sha256()
    for path in sorted(file for top in tops for file in ([top] if top.is_file() else top.rglob("*.py"))):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    return code.hexdigest()
