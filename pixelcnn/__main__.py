"""The core by command line: python -m pixelcnn {train,evaluate,check,sample,complete,bench,bench-training} ...

It needs the core's packages alone, and reads prepared datasets (`dvc repro prepare@DATASET` writes them).
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pixelcnn.bench import SAMPLERS, bench, write_json
from pixelcnn.causality import count_leaks
from pixelcnn.checkpoint import load_checkpoint, load_joint_weights, save_checkpoint
from pixelcnn.completion import complete, completion_log_prob, resample
from pixelcnn.config import CONFIG_CLASSES, checked_config
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import check_fit, evaluate, evaluate_completion, format_nll
from pixelcnn.fast_sampling import sample
from pixelcnn.images import from_png, to_sheet
from pixelcnn.likelihood import log_prob
from pixelcnn.model import AutoregressiveModel, build_model
from pixelcnn.training import StepReport, TrainConfig, fit, format_progress
from pixelcnn.training_bench import bench_training

KNOWN_PARTS = ("top", "left", "bottom", "right")
FROM_DATASET = ("image_shape", "num_levels", "num_labels")
NOT_BY_HAND = (*FROM_DATASET, "completer_features")  # the pipeline trains a completer, as a second part


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use. Leave it out for the CPU.")
    return torch.device(name)


def _add_fields(parser: argparse.ArgumentParser, config_class: type, leave_out: tuple[str, ...] = ()) -> None:
    """Offer each field of a config dataclass as an option."""
    for field in dataclasses.fields(config_class):
        if field.name in leave_out:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(option, action="store_true", default=None)
        else:
            required = field.default is dataclasses.MISSING
            default = "" if required else f"default {field.default}"
            parser.add_argument(option, type=field.type, required=required, help=default)


def _given(arguments: argparse.Namespace, config_class: type, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(config_class) if f.name not in leave_out]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _load_with_noise(arguments: argparse.Namespace) -> tuple[AutoregressiveModel, Tensor, Tensor | None]:
    """Return the model, the noise for the samples that are asked for, and their label."""
    device = _device(arguments.device)
    model, _ = load_checkpoint(arguments.checkpoint)
    num = arguments.num_samples
    if not 1 <= num <= 1024:
        raise ValueError(f"--num-samples must be from 1 to 1024, got {num}.")
    # Drawn on the CPU, so that a seed means the same noise on every device.
    u = torch.rand(num, *model.config.image_shape, generator=torch.Generator().manual_seed(arguments.seed))
    label = None if arguments.label is None else torch.full((num,), arguments.label, device=device)
    return model.to(device), u.to(device), label


def _write_sheet(levels: Tensor, num_levels: int, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    to_sheet(levels, num_levels, num_columns=min(8, len(levels)), zoom=4).save(out, format="PNG")
    print(f"wrote {out}")


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


def train_command(arguments: argparse.Namespace) -> None:
    """Train a network on a prepared dataset, evaluate it, and write its checkpoint.

    `torchrun --nproc_per_node N -m pixelcnn train ...` shares every batch among N processes; process 0 alone prints,
    validates and writes.
    """
    data = load_dataset(arguments.data)
    network = {"image_shape": data.image_shape, "num_levels": data.num_levels, "num_labels": len(data.label_names)}
    network |= _given(arguments, CONFIG_CLASSES[arguments.model], NOT_BY_HAND)
    config = checked_config(CONFIG_CLASSES[arguments.model], network, arguments.model)
    train_config = checked_config(TrainConfig, _given(arguments, TrainConfig), "train")
    device, rank = _join_processes(_device(arguments.device))
    torch.manual_seed(train_config.seed)
    model = build_model(config)
    if arguments.init_from is not None:
        load_joint_weights(model, arguments.init_from)
    model = model.to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{arguments.model} on {data.name} ({data.protocol}): {num_parameters:,} parameters")
    last_line = 0.0

    def print_progress(report: StepReport) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > 5 or report.validation_nll_nats is not None:
            last_line = time.monotonic()
            print(format_progress(report, data), flush=True)

    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    state_file = out.with_name(f"{out.name}.state")
    fit(model, data, train_config, print_progress, state_file=state_file)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank != 0:
        return
    scores: dict[str, Any] = evaluate(model, data)
    if config.context_features:
        scores |= evaluate_completion(model, data)
    scores |= {"dataset": data.name, "protocol": data.protocol, "data_hash": data.data_hash}
    save_checkpoint(out, model, scores)
    print(json.dumps(scores, indent=2))
    print(f"wrote {out}; {state_file} lets a longer run go on from here")


def evaluate_command(arguments: argparse.Namespace) -> None:
    """Measure the likelihood of a checkpoint on a prepared dataset."""
    model, _ = load_checkpoint(arguments.checkpoint)
    data: Dataset = load_dataset(arguments.data)
    model = model.to(_device(arguments.device))
    scores = evaluate(model, data, num_images=arguments.num_images)
    if arguments.completion:
        scores |= evaluate_completion(model, data, num_images=arguments.num_images)
    print(json.dumps({"protocol": data.protocol, **scores}, indent=2))


def check_command(arguments: argparse.Namespace) -> None:
    """Change every sub-pixel of an image, and count those that reach an earlier logit: 0, or the likelihood is none."""
    model, _ = load_checkpoint(arguments.checkpoint)
    config = model.config
    if arguments.data is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        levels = torch.randint(config.num_levels, config.image_shape, generator=generator)
    else:
        data = load_dataset(arguments.data)
        check_fit(model, data)
        levels = data.levels("test", slice(0, 1))[0]
    num = levels.numel()
    for name, network in (("", model), ("completer: ", model.completer)):
        if network is None:
            continue
        leaks, reaching = count_leaks(network, levels)
        print(f"{name}{leaks} leaks in {num:,} sub-pixels; {reaching:,} reach a later logit")
        if leaks:
            raise ValueError(
                f"{leaks} of {num:,} sub-pixels reach their own or an earlier logit: the model sees the future."
            )


def sample_command(arguments: argparse.Namespace) -> None:
    """Draw whole images from a checkpoint into a PNG."""
    model, u, label = _load_with_noise(arguments)
    config = model.config
    levels = sample(model, u, label, arguments.temperature)
    with torch.inference_mode():
        nats = -log_prob(model, levels, label)
    for value in nats.tolist():
        print(format_nll(value, config.image_shape, config.num_levels))
    _write_sheet(levels, config.num_levels, Path(arguments.out))


def complete_command(arguments: argparse.Namespace) -> None:
    """Complete the missing half of a PNG, several ways, into a PNG."""
    model, u, label = _load_with_noise(arguments)
    config = model.config
    _, height, width = config.image_shape
    try:
        png = Path(arguments.image).read_bytes()
    except OSError as error:
        raise ValueError(f"--image {arguments.image} cannot be read: {error.strerror}.") from None
    image = from_png(png, config.image_shape, config.num_levels)
    observed = torch.zeros(1, 1, height, width, dtype=torch.bool)
    half = {
        "top": (slice(None, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(None, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
    }[arguments.known]
    observed[0, 0][half] = True
    image = image.expand(len(u), -1, -1, -1).to(u.device)
    observed = observed.expand(len(u), -1, -1, -1).to(u.device)
    if arguments.proposals == 1:
        levels = complete(model, image, observed, u, label, arguments.temperature)
    else:
        if not 1 <= arguments.proposals <= 1024 or arguments.temperature != 1:
            raise ValueError("--proposals must be from 1 to 1024, and needs --temperature 1.")
        generator = torch.Generator().manual_seed(arguments.seed)
        num = len(u)
        proposed = torch.rand(num, arguments.proposals, *config.image_shape, generator=generator).to(u.device)
        choice = torch.rand(num, generator=generator).to(u.device)
        levels, effective = resample(model, image, observed, proposed, choice, label)
        print(f"{effective.mean().item():.1f} of {arguments.proposals} proposals are effective")
    for value in completion_log_prob(model, levels, observed, label).tolist():
        print(f"log p(missing | observed) = {value:.2f} nats")
    given = torch.where(observed[:1], image[:1], 0)
    _write_sheet(torch.cat([given, levels]), config.num_levels, Path(arguments.out))


def bench_command(arguments: argparse.Namespace) -> None:
    """Time the samplers on a checkpoint."""
    if min(arguments.batch_sizes) < 1 or min(arguments.sides or [1]) < 1 or arguments.exact_images < 0:
        raise ValueError("--batch-sizes and --sides must be at least 1 and --exact-images at least 0.")
    if not 0 < arguments.seconds <= 600:
        raise ValueError(f"--seconds must be above 0 and at most 600, got {arguments.seconds}.")
    model, _ = load_checkpoint(arguments.checkpoint)
    samplers = arguments.samplers or list(SAMPLERS)
    result = bench(
        model, arguments.batch_sizes, samplers, arguments.seconds, arguments.exact_images, arguments.sides or []
    )
    if arguments.out is not None:
        write_json(Path(arguments.out), result)
        print(f"wrote {arguments.out}")


def bench_training_command(arguments: argparse.Namespace) -> None:
    """Time the trainer's step against the plain loop's, on a checkpoint's network."""
    if not 1 <= arguments.batch_size <= 4096 or not 1 <= arguments.rounds <= 10_000:
        raise ValueError("--batch-size must be from 1 to 4096 and --rounds from 1 to 10000.")
    if arguments.threads is not None:
        if not 1 <= arguments.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, got {arguments.threads}.")
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _ = load_checkpoint(arguments.checkpoint)
    bench_training(model, arguments.batch_size, arguments.rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pixelcnn", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(
        required=True, metavar="{train,evaluate,check,sample,complete,bench,bench-training}"
    )

    def add(name: str, run: Callable[[argparse.Namespace], None], parent: Any = commands) -> argparse.ArgumentParser:
        command = parent.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        return command

    train = commands.add_parser("train", help=train_command.__doc__)
    architectures = train.add_subparsers(required=True, dest="model", metavar="{pixelcnn,gated_pixelcnn}")
    for name, config_class in CONFIG_CLASSES.items():
        command = add(name, train_command, architectures)
        command.add_argument("--data", required=True, help="prepared dataset, e.g. data/mnist.safetensors")
        command.add_argument("--out", required=True, help="folder for the checkpoint")
        command.add_argument(
            "--init-from", help="checkpoint to start from: the same network, with or without a context network"
        )
        _add_fields(command, config_class, NOT_BY_HAND)
        _add_fields(command, TrainConfig)

    evaluation = add("evaluate", evaluate_command)
    evaluation.add_argument("--checkpoint", required=True)
    evaluation.add_argument("--data", required=True)
    evaluation.add_argument("--num-images", type=int, help="the first so many of each split; all if left out")
    evaluation.add_argument("--completion", action="store_true", help="score completion of the test split, too")

    check = add("check", check_command)
    check.add_argument("--checkpoint", required=True)
    check.add_argument("--data", help="take its first test image; a random image if left out")
    check.add_argument("--seed", type=int, default=0, help="of the random image")

    for name, run in (("sample", sample_command), ("complete", complete_command)):
        command = add(name, run)
        command.add_argument("--checkpoint", required=True)
        command.add_argument("--out", required=True, help="PNG to write")
        command.add_argument("--num-samples", type=int, default=8)
        command.add_argument("--label", type=int, help="class to draw; left out for none")
        command.add_argument("--temperature", type=float, default=1.0)
        command.add_argument("--seed", type=int, default=0)
        if run is complete_command:
            command.add_argument("--image", required=True, help="PNG of exactly the model's size")
            command.add_argument(
                "--proposals", type=int, default=1, help="choose each completion from so many, by the joint model"
            )
            command.add_argument("--known", choices=KNOWN_PARTS, default="top", help="the half that is known")

    timing = commands.add_parser("bench", help=bench_command.__doc__, description=bench_command.__doc__)
    timing.set_defaults(run=bench_command)
    timing.add_argument("--checkpoint", required=True)
    timing.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    timing.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="all if left out")
    timing.add_argument("--seconds", type=float, default=3.0, help="how long to measure each figure, about")
    timing.add_argument("--exact-images", type=int, default=16, help="images to compare with the model; 0 for none")
    timing.add_argument("--sides", type=int, nargs="+", help="image sides at which to time a pixel; none if left out")
    timing.add_argument("--out", help="JSON file to write, too")

    summary = bench_training_command.__doc__
    training = commands.add_parser("bench-training", help=summary, description=summary)
    training.set_defaults(run=bench_training_command)
    training.add_argument("--checkpoint", required=True)
    training.add_argument("--batch-size", type=int, default=32)
    training.add_argument("--rounds", type=int, default=20, help="steps of each loop; the median counts")
    training.add_argument("--threads", type=int, help="torch's own choice if left out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's ends in one sentence and exit code 1."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments.run(arguments)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
