"""The core by command line: python -m pixelcnn {train,evaluate,check,sample,complete,compile,bench,pack,unpack,rank}.

It needs the core's packages alone, and reads prepared datasets (`dvc repro full/dvc.yaml:prepare@mnist` writes one).
"""

import csv
import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from typer import Argument, BadParameter, Option, Typer
from typer.main import get_command

from pixelcnn import evaluation
from pixelcnn.bench import SAMPLERS, bench, write_json
from pixelcnn.checkpoint import check_replaceable, load_checkpoint, load_joint_weights, save_checkpoint
from pixelcnn.completion import complete, resample, score_completions
from pixelcnn.config import MAX_SIDE, checked_config
from pixelcnn.data import load_dataset, replaced
from pixelcnn.evaluation import evaluate, in_batches
from pixelcnn.images import from_png, to_sheet
from pixelcnn.likelihood import bits_per_dim, count_leaks, log_prob
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.registry import architectures, build_model
from pixelcnn.sampling.fast import compile_sampler, sample, what_compiling_lacks
from pixelcnn.sampling.plan import Plan
from pixelcnn.training import TrainConfig, fit, tell_progress

# What the dataset fixes; and the networks that the pipeline trains as parts of their own.
NOT_BY_HAND: tuple[str, ...] = ("image_shape", "num_levels", "num_labels", "completer_features", "label_features")
NOT_BY_HAND += ("added_features", "added_context_width")
SEVERAL_VALUES = ("--batch-sizes", "--samplers", "--sides")

Checkpoint = Annotated[Path, Option(help="folder of a checkpoint, or the name of released weights")]
Data = Annotated[Path, Option(help="prepared dataset, e.g. data/mnist.safetensors")]
Device = Annotated[Literal["cpu", "cuda"], Option()]
Seed = Annotated[int, Option(min=0, max=2**63 - 1)]
Label = Annotated[int | None, Option(min=-1, max=2**63 - 1, help="class to draw; left out for none")]


def _png(path: Path) -> Path:
    if path.suffix != ".png":
        raise BadParameter(f"{path} must end in .png.")
    return path


NumSamples = Annotated[int, Option(min=1, max=1024)]
Images = Annotated[Path, Option(help="folder of PNG files, one PNG, .npy array (N, C, H, W), or prepared dataset")]
Split = Annotated[str, Option(help="images of a dataset: train, validation or test")]
PngOut = Annotated[Path, Option(help="PNG to write", dir_okay=False, callback=_png)]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use. Leave it out for the CPU.")
    return torch.device(name)


def _load_with_noise(
    checkpoint: Path, device_name: str, num: int, label: int | None, seed: int
) -> tuple[AutoregressiveModel, Tensor, Tensor | None]:
    """Return the model, (N, C, H, W) noise for the samples that are asked for, and their (N,) label."""
    device = _device(device_name)
    model, _ = load_checkpoint(checkpoint)
    # Drawn on the CPU, so that a seed means the same noise on every device.
    u = torch.rand(num, *model.config.image_shape, generator=torch.Generator().manual_seed(seed))
    return model.to(device), u.to(device), None if label is None else torch.full((num,), label, device=device)


def _write_sheet(levels: Tensor, num_levels: int, out: Path) -> None:
    with replaced(out) as new:
        to_sheet(levels, num_levels, num_columns=min(8, len(levels)), zoom=4).save(new, format="PNG")


def _join_processes(device: torch.device) -> tuple[torch.device, int]:
    """Join the processes that torchrun started, if it did; return this one's device and rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device, 0
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc_per_node must be at most the {torch.cuda.device_count()} CUDA devices of this "
                f"machine, got {os.environ['LOCAL_WORLD_SIZE']}."
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank()


def train_command(
    architecture: str,
    *,
    data: Data,
    out: Annotated[Path, Option(help="folder for the checkpoint")],
    init_from: Annotated[Path | None, Option(help="checkpoint of the same network, context or not")] = None,
    device: Device = "cpu",
    **settings: Any,
) -> None:
    """Train a network on a prepared dataset, evaluate it, and write its checkpoint.

    `torchrun --nproc_per_node N -m pixelcnn train ...` shares every batch among N processes; process 0 alone prints,
    validates and writes.
    """
    check_replaceable(out)
    dataset = load_dataset(data)
    network = {"image_shape": dataset.image_shape, "num_levels": dataset.num_levels}
    network |= {"num_labels": len(dataset.label_names)}
    train = {field.name: settings.pop(field.name) for field in dataclasses.fields(TrainConfig)}
    config = checked_config(architectures()[architecture], network | settings, architecture)
    train_config = checked_config(TrainConfig, train, "train")
    place, rank = _join_processes(_device(device))
    torch.manual_seed(train_config.seed)
    model = build_model(config)
    if init_from is not None:
        load_joint_weights(model, init_from)
    Plan(model)  # now: a network that is too deep for the samplers is not trained in vain
    model = model.to(place)
    if rank == 0:
        num_parameters = sum(p.numel() for p in model.parameters())
        print(f"{architecture} on {dataset.name} ({dataset.protocol}): {num_parameters:,} parameters")
    out = out if out.name else out.resolve()  # `.` has no name
    out.parent.mkdir(parents=True, exist_ok=True)
    state_file = out.with_name(f"{out.name}.state")
    if init_from is not None and state_file.exists() and rank == 0:
        print(f"goes on from {state_file}: --init-from counts only at a start. Delete that file to start afresh.")
    fit(model, dataset, train_config, tell_progress(partial(print, flush=True), dataset), state_file=state_file)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank != 0:
        return
    scores: dict[str, Any] = evaluate(model, dataset)
    if config.context_features:
        scores |= evaluation.evaluate_completion(model, dataset, score=score_completions)
    scores |= {"dataset": dataset.name, "protocol": dataset.protocol, "data_hash": dataset.data_hash}
    # What the pipeline's `register` wants of a checkpoint, too.
    scores |= {"label_names": dataset.label_names, evaluation.CHECKED_SCORE: evaluation.checked_score(model, dataset)}
    save_checkpoint(out, model, scores)
    print(json.dumps(scores, indent=2))
    print(f"wrote {out}; {state_file} lets a longer run go on from here")


def evaluate_command(
    checkpoint: Checkpoint,
    data: Data,
    device: Device = "cpu",
    num_images: Annotated[int | None, Option(help="the first so many of each split; all if left out", min=1)] = None,
    completion: Annotated[bool, Option("--completion", help="score completion of the test split, too")] = False,
) -> None:
    """Measure the likelihood of a checkpoint on a prepared dataset."""
    model, _ = load_checkpoint(checkpoint)
    dataset = load_dataset(data)
    model = model.to(_device(device))
    scores = evaluate(model, dataset, num_images=num_images)
    if completion:
        scores |= evaluation.evaluate_completion(model, dataset, num_images=num_images, score=score_completions)
    print(json.dumps({"protocol": dataset.protocol, **scores}, indent=2))


def check_command(
    checkpoint: Checkpoint,
    data: Annotated[Path | None, Option(help="take its first test image; a random image if left out")] = None,
    seed: Seed = 0,
) -> None:
    """Change every sub-pixel of an image, and count those that reach their own or an earlier logit: it must be 0.

    Otherwise the model's likelihoods are not valid.
    """
    model, _ = load_checkpoint(checkpoint)
    config = model.config
    if data is None:
        levels = torch.randint(config.num_levels, config.image_shape, generator=torch.Generator().manual_seed(seed))
    else:
        dataset = load_dataset(data)
        evaluation.check_fit(config, dataset)
        levels = dataset.levels("test", slice(0, 1))[0]
    num = levels.numel()
    for name, network in (("", model), ("completer: ", model.completer)):
        if network is None:
            continue
        leaks, reaching = count_leaks(network, levels, on_progress=_progress_printer("changed", "sub-pixels"))
        print(f"{name}{leaks} leaks in {num:,} sub-pixels; {reaching:,} reach a later logit")
        if leaks:
            raise ValueError(
                f"{leaks} of {num:,} sub-pixels reach their own or an earlier logit: the model sees the future."
            )


def sample_command(
    checkpoint: Checkpoint,
    out: PngOut,
    device: Device = "cpu",
    num_samples: NumSamples = 8,
    label: Label = None,
    temperature: float = 1.0,
    seed: Seed = 0,
) -> None:
    """Draw whole images from a checkpoint into a PNG."""
    model, u, labels = _load_with_noise(checkpoint, device, num_samples, label, seed)
    config = model.config
    levels = sample(model, u, labels, temperature)
    with torch.inference_mode():
        nats = -in_batches(log_prob, model, levels, labels)
    for value in nats.tolist():
        print(evaluation.format_nll(value, config.image_shape, config.num_levels))
    _write_sheet(levels, config.num_levels, out)
    print(f"wrote {out}")


def complete_command(
    checkpoint: Checkpoint,
    image: Annotated[Path, Option(help="PNG of exactly the model's size", exists=True, dir_okay=False)],
    out: PngOut,
    device: Device = "cpu",
    known: Annotated[Literal["top", "left", "bottom", "right"], Option(help="the half that is known")] = "top",
    proposals: Annotated[int, Option(help="choose each from so many, by the joint model", min=1, max=1024)] = 1,
    num_samples: NumSamples = 8,
    label: Label = None,
    temperature: float = 1.0,
    seed: Seed = 0,
) -> None:
    """Complete the missing half of a PNG, several ways, into a PNG."""
    model, u, labels = _load_with_noise(checkpoint, device, num_samples, label, seed)
    config = model.config
    _, height, width = config.image_shape
    top, left = torch.arange(height)[:, None] < height // 2, torch.arange(width) < width // 2
    half = {"top": top, "bottom": ~top, "left": left, "right": ~left}[known]
    given = from_png(image.read_bytes(), config.image_shape, config.num_levels, observed=half)
    observed = half.expand(len(u), 1, height, width).to(u.device)
    images = given.expand(len(u), -1, -1, -1).to(u.device)
    if proposals == 1:
        levels = complete(model, images, observed, u, labels, temperature)
    else:
        if temperature != 1:
            raise ValueError("--proposals needs --temperature 1.")
        generator = torch.Generator().manual_seed(seed)
        proposed = torch.rand(len(u), proposals, *config.image_shape, generator=generator).to(u.device)
        choice = torch.rand(len(u), generator=generator).to(u.device)
        levels, effective = resample(model, images, observed, proposed, choice, labels)
        print(f"effective number of proposals: {effective.mean().item():.1f} of {proposals}")
    for value in in_batches(score_completions, model, levels, observed, labels).tolist():
        print(f"log p(missing | observed) = {value:.2f} nats")
    shown = torch.where(observed[:1], images[:1], 0)
    _write_sheet(torch.cat([shown, levels]), config.num_levels, out)
    print(f"wrote {out}")


def compile_command() -> None:
    """Compile the sampler for this processor, once: else the first to sample waits for it."""
    if reason := what_compiling_lacks():
        raise ValueError(
            f"the sampler cannot be compiled here ({reason}). Install numba, or name a folder for what it compiles by "
            "NUMBA_CACHE_DIR."
        )
    print(f"compiled after {compile_sampler():.1f} s")


def bench_command(
    checkpoint: Checkpoint,
    batch_sizes: Annotated[list[int], Option(min=1)] = [1, 4, 16, 64],  # noqa: B006 -- typer shows it as the default
    samplers: Annotated[list[str], Option(help=f"all if left out: {', '.join(map(repr, SAMPLERS))}")] = [],  # noqa: B006
    seconds: Annotated[float, Option(help="how long to measure each figure, about", min=0.01, max=600)] = 3.0,
    exact_images: Annotated[int, Option(help="images to compare with the model; 0 for none", min=0)] = 16,
    sides: Annotated[list[int], Option(help="image sides at which to time a pixel", min=1, max=MAX_SIDE)] = [],  # noqa: B006
    out: Annotated[Path | None, Option(help="JSON file to write, too", dir_okay=False)] = None,
) -> None:
    """Time the samplers on a checkpoint."""
    if unknown := set(samplers) - set(SAMPLERS):
        raise ValueError(f"--samplers must be out of {', '.join(map(repr, SAMPLERS))}, got {min(unknown)!r}.")
    model, _ = load_checkpoint(checkpoint)
    result = bench(model, batch_sizes, samplers or list(SAMPLERS), seconds, exact_images, sides)
    if out is not None:
        write_json(out, result)
        print(f"wrote {out}")
    if result.get("exactness", {}).get("float64", {}).get("num_levels_that_differ"):
        raise ValueError("in float64 the sampler is not the network: a block computes other than it describes.")


def _progress_printer(verb: str, noun: str = "images") -> Callable[[int, int], None]:
    """Return what prints how many are done, and about how long the others take, every two seconds."""
    start = last = time.monotonic()

    def on_progress(done: int, num: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2 and done < num:
            last = now
            left_s = (now - start) / done * (num - done)
            print(f"{verb} {done:,} of {num:,} {noun}, about {left_s:.0f} s left", file=sys.stderr, flush=True)

    return on_progress


def _counted(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def pack_command(
    checkpoint: Checkpoint,
    images: Images,
    out: Annotated[Path, Option(help="file to write, e.g. images.pxl")],
    labels: Annotated[Path | None, Option(help=".npy array or dataset: labels to keep, and to tell the model")] = None,
    split: Split = "test",
    block_images: Annotated[int | None, Option(help="images each; of 24 KiB if left out", min=1, max=4096)] = None,
) -> None:
    """Pack images without loss into a file that the same checkpoint unpacks (docs/packing.md)."""
    from pixelcnn.packing import pack  # it needs constriction, which a machine for training need not have

    on_progress = _progress_printer("packed")
    made = pack(checkpoint, images, out, labels=labels, split=split, block_images=block_images, on_progress=on_progress)
    if made.num_left_out:
        print(f"left out: {_counted(made.num_left_out, 'file')} not named .png")
    print(f"wrote {out}: {_counted(made.num_images, 'image')} in {_counted(made.num_bytes, 'byte')}")


def unpack_command(
    file: Annotated[Path, Argument(help="what `pack` wrote")],
    checkpoint: Checkpoint,
    out: Annotated[Path, Option(help=".npy file, folder for a PNG of each image, or .png for one")],
    images: Annotated[str | None, Option(help="some of them, counted from 0: 17, or 100:200; all if left out")] = None,
) -> None:
    """Unpack what `pack` has packed."""
    from pixelcnn.packing import unpack

    some = None
    if images is not None:
        if not re.fullmatch(r"\d+(:\d+)?", images):
            raise ValueError(f"--images must be a number, or two of them like 100:200, got {images!r}.")
        first, _, stop = images.partition(":")
        some = int(first), int(stop) if stop else int(first) + 1
    num = unpack(checkpoint, file, out, images=some, on_progress=_progress_printer("unpacked"))
    print(f"wrote {_counted(num, 'image')} to {out}")


def rank_command(
    checkpoint: Checkpoint, images: Images, out: PngOut = Path("ranking.png"), split: Split = "test"
) -> None:
    """Rank pictures by how strange a model finds them: a table (CSV) to standard output, and a sheet.

    The sheet has the strangest pictures above, the most usual ones below.
    """
    from pixelcnn.packing import rank

    # Said before any work.
    if not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out must be a .png in a folder that exists and that you may write to, got {out}.")
    if out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"--out must be a .png that is not among --images {images}, got {out}.")
    ranked = rank(checkpoint, images, split=split, on_progress=_progress_printer("scored"))
    _write_sheet(ranked.ends, ranked.config.num_levels, out)
    place = ranked.nats.argsort(descending=True, stable=True).argsort() + 1
    bits = [bits_per_dim(nats, ranked.config.image_shape) for nats in ranked.nats.tolist()]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["rank", "corrected_nats", "rank_by_nats", "nats", "bits_per_dim", "png_bytes", "path"])
    scores = zip(ranked.corrected, place, ranked.nats, bits, ranked.png_bytes, ranked.names, strict=True)
    for i, (corrected, by_nats, nats, bpd, size, name) in enumerate(scores, start=1):
        table.writerow([i, f"{corrected:.3f}", int(by_nats), f"{nats:.3f}", f"{bpd:.5f}", int(size), name])
    left_out = f"; left out: {_counted(ranked.num_left_out, 'file')} not named .png" if ranked.num_left_out else ""
    print(f"wrote {out}{left_out}", file=sys.stderr)


def _field_options(config_class: type, leave_out: tuple[str, ...] = ()) -> Iterator[inspect.Parameter]:
    """Yield each field of a config dataclass as an option, with its sentence of the docstring."""
    docs = "\n\n".join(inspect.getdoc(c) or "" for c in config_class.__mro__ if dataclasses.is_dataclass(c))
    meanings = dict(re.findall(r"^    (\w+): (.+?)(?=\n    \w|\n\n|\Z)", docs, re.MULTILINE | re.DOTALL))
    kinds = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in leave_out:
            continue
        meaning, kind = " ".join(meanings.get(field.name, "").split()), kinds[field.name]
        # Named in full: typer would add --no-... to a flag that is off, too.
        name = field.name.replace("_", "-")
        option = Option(f"--{name}/--no-{name}" if field.default is True else f"--{name}", help=meaning)
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):  # an option that may be given several times
            kind = GenericAlias(list, get_args(kind)[:1])
            default = list(default) if isinstance(default, tuple) else default
        annotation: Any = Annotated[kind, option]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _trainer_of(architecture: str, config_class: type) -> Callable[..., None]:
    """Return the train command of an architecture, whose options are its config's and TrainConfig's fields."""

    def command(**arguments: Any) -> None:
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        train_command(architecture, **settings)

    _, *common, _ = inspect.signature(train_command).parameters.values()
    options = [*common, *_field_options(config_class, NOT_BY_HAND), *_field_options(TrainConfig)]
    names = ["architecture", *(option.name for option in options)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{config_class.__name__} has a field {twice[0]!r}, which is an option of training: rename it."
        )
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__doc__ = train_command.__doc__
    return command


def _app() -> Typer:
    style: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}
    app = Typer(help="The core: models, likelihood, sampling, completion, training.", **style)
    train = Typer(help="Train an architecture on a prepared dataset.", **style)
    for name, config_class in architectures().items():
        train.command(name)(_trainer_of(name, config_class))
    app.add_typer(train, name="train")
    commands: list[Callable[..., None]] = [evaluate_command, check_command, sample_command, complete_command]
    commands += [compile_command, bench_command, pack_command, unpack_command, rank_command]
    for command in commands:
        app.command(command.__name__.removesuffix("_command"))(command)
    return app


def _one_value_each(words: Sequence[str]) -> Iterator[str]:
    """Yield `--sides 14 28` as typer takes it: `--sides 14 --sides 28`."""
    option = ""
    for i, word in enumerate(words):
        if word.startswith("--"):
            option = word if word in SEVERAL_VALUES else ""
        elif option and words[i - 1] != option:
            yield option
        yield word


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 1 after one sentence for a mistake of the user's, 2 for unknown words."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        words = list(_one_value_each(sys.argv[1:] if argv is None else argv))
        get_command(_app())(words, prog_name="python -m pixelcnn")
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:  # typer's way to end a command
        if end.code == 130:
            print("stopped", file=sys.stderr)
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
