"""The wheel: what it holds, and that it works where nothing of this clone is."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.local import share_compiled

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of what git tracks: a build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if name.startswith(("app/", "pipelines/", "pixelcnn/", "weights/")) or "/" not in name:
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / name)
    # Of a build before, a file that is gone since.
    removed = folder / "source/build/lib/pixelcnn/removed.py"
    removed.parent.mkdir(parents=True)
    removed.touch()
    # A checkpoint that is being written, or was cut off.
    unfinished = folder / "source/weights/.pixelcnn-mnist.new/config.json"
    unfinished.parent.mkdir()
    unfinished.touch()
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("pixelcnn-*.whl"))


def test_it_holds_code_assets_and_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("app", "pipelines", "pixelcnn")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in (".py", ".css", ".html", ".js", ".yaml", ".toml", ".j2")
    }
    weights = {
        f"pixelcnn/weights/{folder.name}/{name}"
        for folder in (ROOT / "weights").iterdir()
        if (folder / "config.json").exists()
        for name in ("config.json", "model.safetensors", "scores.json", "README.md")
    }
    assert wanted | weights <= names
    assert "pixelcnn/removed.py" not in names
    assert {name for name in names if name.startswith("pixelcnn/weights/.")} == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"app", "pipelines", "pixelcnn"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "empty",
    [
        pytest.param(False, id="with the packages of this one"),
        pytest.param(
            True,
            id="empty",
            marks=[
                pytest.mark.repeated,
                pytest.mark.skipif("PIXELCNN_TEST_INSTALL" not in os.environ, reason="asks an index: make test-slow"),
            ],
        ),
    ],
)
def test_it_works_in_a_new_environment(wheel: Path, tmp_path: Path, empty: bool) -> None:
    """The command draws with released weights, by name; the library loads them, and the canvas is there."""
    venv.create(tmp_path / "venv", with_pip=False)
    binaries = tmp_path / "venv/bin"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--quiet"]
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    if empty:
        subprocess.run([*pip, f"{wheel}[app]", "-c", str(ROOT / "constraints.txt")], check=True)
    else:
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        # At the end of the path, and without this clone, which an editable installation adds.
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))
        share_compiled(site / "pixelcnn")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["sample", "--checkpoint", "pixelcnn-mnist", "--num-samples", "1", "--out", "one.png"]
    done = subprocess.run(
        [binaries / "pixelcnn", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    code = "import app.canvas.grid; from pixelcnn import checkpoint, load_checkpoint; "
    code += "print(load_checkpoint('gated_pixelcnn-mnist')[1]['dataset'], checkpoint.__file__)"
    done = subprocess.run(
        [binaries / "python", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["mnist", str(site / "pixelcnn/checkpoint.py")], done.stderr
    words[2] = "pixelcnn-mnst"
    done = subprocess.run(
        [binaries / "pixelcnn", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    names = sorted(config.parent.name for config in (ROOT / "weights").glob("*/config.json"))
    assert f"released weights: {', '.join(names)}." in done.stderr
