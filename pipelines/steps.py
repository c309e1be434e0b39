"""The pipeline's commands: `python -m pipelines.steps prepare DATASET` and so on. DVC's stages call these.

A mistake of the person who calls is one sentence on stderr and exit code 1; a traceback is a bug of ours. What imports
MLflow, Prefect, BentoML or Jinja is imported by the commands that need it: each takes long.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from pipelines.datasets import checks, own, sources
from pipelines.datasets import prepare as preparation
from pipelines.datasets.letters import write_letters
from pipelines.datasets.pictures import write_pictures
from pipelines.errors import run_typer
from pipelines.judging.judge import write_judges
from pipelines.params import load_params, repro_command
from pipelines.registry.provenance import prepared_file

app = Typer(help="The pipeline's commands.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_RAW = Path("data/raw")
_Dataset = Annotated[str, Argument(help="e.g. mnist5k")]
_Why = Annotated[str | None, Option(help="recorded, beside who asked")]
_Pair = Annotated[str, Argument(help="a pair of params.yaml, e.g. pixelcnn-mnist5k")]


def _check_known(dataset: str) -> None:
    from pipelines.registry.versions import check_known

    check_known(dataset)


@app.command()
def fetch(dataset: _Dataset) -> None:
    """Copy or download the official files of a dataset into `data/raw/DATASET`."""
    source = load_params().dataset(dataset).source
    if source.kind != "official":
        raise ValueError(f"{dataset} is not fetched: its images are read where they lie, in {source.path}.")
    sources.fetch(source.path, _RAW / dataset)


@app.command()
def prepare(dataset: _Dataset) -> None:
    """Write `data/DATASET.safetensors`, with fixed splits."""
    params = load_params()
    spec = params.dataset(dataset)
    preparation.prepare(dataset, spec, _RAW / dataset, prepared_file(dataset), params.data, params.checks)


@app.command()
def confirm(dataset: _Dataset) -> None:
    """Accept the change of a dataset that `prepare` refused; then run `prepare` again."""
    load_params().dataset(dataset)
    checks.confirm(dataset)
    print(f"confirmed. Go on: {repro_command('prepare', dataset)}")


@app.command()
def add(
    name: Annotated[str, Argument(help="small letters, digits and _")],
    images: Annotated[Path, Option(readable=False, help="folder of pictures, IDX files or CIFAR's .bin; .npy, .npz")],
    side: Annotated[str | None, Option(help="pixels, at most 64: 28, or 48x32 for width x height")] = None,
    colour: Annotated[own.Colour | None, Option()] = None,
    levels: Annotated[int | None, Option(help="2 to 256", min=2, max=256)] = None,
    fit: Annotated[own.Fit | None, Option(help="of pictures of another shape")] = None,
    minutes: Annotated[float, Option(help="of training", min=0.01)] = 4.0,
    flips: Annotated[bool, Option("--flips", help="a mirrored picture is one of the same kind")] = False,
    no_labels: Annotated[bool, Option("--no-labels", help="sub-folders are no labels")] = False,
    skip_broken: Annotated[bool, Option("--skip-broken", help="leave out pictures that cannot be read")] = False,
    keep: Annotated[bool, Option("--keep", help="keep one of this name that was added from the same path")] = False,
) -> None:
    """Make a dataset of pictures, and a pair that suits it; what is not said is chosen after a look at them."""
    wishes = own.Wishes(
        side=own.side_of(side),
        colour=colour,
        levels=levels,
        fit=fit,
        flips=flips,
        labels=not no_labels,
        skip_broken=skip_broken,
        minutes=minutes,
    )
    print(*own.add(name, images, wishes, keep), sep="\n")


@app.command()
def letters(
    out: Annotated[Path, Argument(help="the .npz file to write")] = Path("data/raw/letters.npz"),
    variants: Annotated[int, Option(help="pictures of each letter in each font", min=1)] = 12,
) -> None:
    """Make pictures of letters, in the fonts that Matplotlib ships, to be added like any others."""
    print(f"{write_letters(out, variants)} letters: {out}")


@app.command()
def pictures(
    dataset: Annotated[str, Argument(help="a dataset that was added")],
    out: Annotated[Path, Option(help="folder to write")],
) -> None:
    """Write a dataset's pictures in the size that its models know, named as they are: `pixelcnn rank` takes them."""
    spec = load_params().dataset(dataset)
    if spec.source.kind == "official":
        raise ValueError(
            f"{dataset} has no picture files. Rank it by: pixelcnn rank --images {prepared_file(dataset)} --split test"
        )
    num, left = write_pictures(spec, out)
    left_out = f"; left out: {len(left.broken)} that cannot be read" if left.broken else ""
    print(f"wrote {num} pictures to {out}{left_out}")


@app.command()
def remove(
    name: Annotated[str, Argument(help="a dataset that was added")],
    force: Annotated[bool, Option("--force", help="even if a model on it is served, which goes on")] = False,
) -> None:
    """Take a dataset that was added out again, with its pairs and what was prepared; its pictures stay."""
    from pipelines.registry import store
    from pipelines.registry.runs import registered_name

    own.own_pairs(name)  # first: nobody gives up a served model for a dataset that stays
    model = registered_name(name)
    if (served := store.latest(model)) and not force:
        raise ValueError(
            f"{served} is served: `BENTOML_HOME={store.home()} bentoml models delete {model}` ends that; or remove "
            "the dataset alone: --force."
        )
    print(*own.remove(name), sep="\n")


@app.command()
def train(pair: _Pair) -> None:
    """Train a pair into `trained/PAIR`."""
    from pipelines.stages import train as stage

    def key() -> str:
        params = load_params()
        return stage.weights_key(pair, params, stage.load(params.pair(pair).dataset))

    before = key()
    stage.train(pair)
    if key() != before:  # DVC would record what is there now, with weights that do not follow from it
        raise ValueError(
            f"settings, data or code were changed while {pair} trained: run this again; as they were, it is done at "
            "once."
        )


@app.command()
def evaluate(pair: _Pair) -> None:
    """Score a trained pair: `models/PAIR` is its checkpoint, `reports/PAIR` has pictures and curves."""
    from pipelines.stages import evaluate as stage
    from pipelines.stages.train import TRAINED_FOLDER, remove_finished_states

    stage.evaluate(pair)
    remove_finished_states(TRAINED_FOLDER / pair)  # DVC has recorded the training, or it would not evaluate


@app.command()
def train_pair(
    pair: _Pair,
    out: Annotated[str | None, Option(help="folder of the checkpoint; a fresh one if left out")] = None,
    report: Annotated[str | None, Option(help="folder of metrics, curve, pictures; beside --out if left out")] = None,
    state: Annotated[str | None, Option(help="folder of a training that is carried over days; it is kept")] = None,
    half: Annotated[bool, Option("--half", help="store half-precision weights where they score alike")] = False,
    reuse: Annotated[bool, Option("--reuse", help="do not train if a version has the same inputs: take it")] = False,
) -> None:
    """Train, evaluate and register a pair, in one run of the flow."""
    from pipelines.stages.train import load

    # Before the flow starts: what is wrong with settings or data is said at once, without a failed flow run.
    load(load_params().pair(pair).dataset)
    from pipelines.flows.train import train_pair as run_flow

    run_flow(pair, out, report, state, half, reuse)


@app.command()
def train_all(
    pairs: Annotated[list[str] | None, Argument(help="pairs of params.yaml; none for the quick start")] = None,
    at_once: Annotated[int, Option(help="how many train at a time")] = 1,
    again: Annotated[bool, Option("--again", help="train even what was trained from the same inputs")] = False,
) -> None:
    """Train several pairs, each in a process of its own, and compare them."""
    load_params()
    from pipelines.flows.train_all import train_all as run_all

    run_all(pairs or None, at_once, again)


@app.command()
def compare() -> None:
    """Write reports/comparison.html: the trained pairs beside each other, from reports/."""
    from pipelines.reports.comparison import REPORTS_FOLDER, read_reports, write_comparison

    print(f"wrote {write_comparison(read_reports(REPORTS_FOLDER))}")


@app.command()
def register(
    checkpoints: Annotated[list[str], Argument(metavar="PAIR|DIR", help="a pair in models/, or a folder")],
) -> None:
    """Register existing checkpoints as versions: those of models/PAIR, or of any folder."""
    from pipelines.promotion.register import register as one

    for checkpoint in checkpoints:
        print(one(checkpoint))


@app.command()
def promote(
    dataset: _Dataset,
    dry_run: Annotated[bool, Option("--dry-run", help="decide and say so, but move and record nothing")] = False,
    version: Annotated[int | None, Option(help="the only one that competes, even if it was rolled back")] = None,
    to: Annotated[str | None, Option(help="an environment, which is to serve what this one serves")] = None,
    why: _Why = None,
) -> None:
    """Register what is in models/ for a dataset, and let the best version become champion, on evidence."""
    _check_known(dataset)
    if to is not None:
        from pipelines.promotion.register import copy_served

        if dry_run or version is not None:
            raise ValueError("--to copies what is served here: it takes neither --version nor --dry-run.")
        print(copy_served(dataset, to, why)["text"])
        return
    from pipelines.flows.promote import promote as decide

    decide(dataset, dry_run, version, why)


@app.command()
def history(dataset: _Dataset) -> None:
    """Say who replaced whom as champion of a dataset, when, and by how much."""
    _check_known(dataset)
    from pipelines.registry.decisions import history as lines

    print(*lines(dataset), sep="\n")


@app.command()
def rollback(
    dataset: _Dataset,
    to: Annotated[int | None, Option(help="a version that was champion; else the one before the present one")] = None,
    why: _Why = None,
) -> None:
    """Make an earlier champion of a dataset champion again; a second rollback goes further back."""
    _check_known(dataset)
    from pipelines.promotion.move import run_rollback

    print(run_rollback(dataset, to, why)["text"])  # without Prefect: nobody who needs this waits for a server


@app.command()
def repair(
    take_over: Annotated[bool, Option("--take-over", help="feed the store, whoever did; follow moved files")] = False,
    why: _Why = None,
) -> None:
    """After a loss: export champions that are not served; make champion what is served where the registry has none."""
    from pipelines.promotion.register import repair_all

    load_params()  # in a folder that is none of ours, a registry would be made, and all be well
    print(*(repair_all(take_over, why) or ["nothing to repair: registry and model store agree."]), sep="\n")


@app.command()
def shadow(
    dataset: _Dataset,
    version: Annotated[int | None, Option(help="the alias challenger if not given; the champion's ends it")] = None,
) -> None:
    """Let another version score what people draw, beside the champion, which alone answers."""
    _check_known(dataset)
    from pipelines.promotion.move import run_shadow

    print(run_shadow(dataset, version))


@app.command()
def backup(file: Annotated[Path, Argument(help="is written, whole or not at all")]) -> None:
    """Write registry and model store into one file, while they are in use."""
    from pipelines.registry.backup import backup as write

    print(write(file))


@app.command()
def restore(
    file: Annotated[Path, Argument(help="of a backup")],
    replace: Annotated[bool, Option("--replace", help="what is there: the registry is kept aside")] = False,
) -> None:
    """Put a backup into the place of registry and model store, and serve its champions."""
    from pipelines.promotion.register import repair_all
    from pipelines.registry.backup import restore as put

    print(put(file, replace))
    for text in repair_all(take_over=True):
        print(text)


@app.command()
def release(why: _Why = None) -> None:
    """Register the weights of weights/PAIR/; they serve where a dataset has no champion yet."""
    from pipelines.promotion.register import release_all

    for text in release_all(why):
        print(text, flush=True)


@app.command()
def judge(dataset: _Dataset) -> None:
    """Train the judges of a dataset, who say what passes for one of its images, into `judges/`."""
    load_params().dataset(dataset)
    from pipelines.stages.train import load

    write_judges(load(dataset), print)


@app.command()
def results() -> None:
    """Write RESULTS.md from the scores in weights/PAIR/."""
    from pipelines.files import atomic_write
    from pipelines.reports.results import RESULTS_FILE, results_text

    atomic_write(RESULTS_FILE, results_text(Path("weights")))
    print(f"wrote {RESULTS_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    return run_typer(app, words[0] if words else "steps", "python -m pipelines.steps", words)


if __name__ == "__main__":
    # As Ctrl-C does: what is half done is removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
