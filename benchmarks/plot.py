"""The figures of `make bench` as a picture and as tables: `python -m benchmarks.plot`, from reports/bench/*.json."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from benchmarks.command import command
from pipelines.files import atomic_write
from pixelcnn.bench import CACHED, CACHED_TORCH, CROPPED, NAIVE, NAIVE_COMPILED, SAMPLERS

PICTURE, TABLES = "bench.png", "bench.md"
_COLOURS = {
    NAIVE: "#9aa0a6",
    CROPPED: "#7b8794",
    NAIVE_COMPILED: "#5f6b7a",
    CACHED_TORCH: "#e0a458",
    CACHED: "#2a7f62",
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every benchmark of a folder, by its pair; refuse one that is no JSON, and those of several machines."""
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is no JSON. Make it again: make bench") from None
    if not results:
        raise ValueError(f"{folder} holds no benchmark. Make one: make bench")
    if len({(one["processor"], one["num_threads"], one["torch"]) for one in results.values()}) > 1:
        raise ValueError(f"{folder} holds figures of several machines or versions of torch. Empty it, then: make bench")
    return results


def plot(results: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Draw benchmarks: milliseconds per image by batch, and the cost of a pixel by image side; return the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.1 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), (name, result) in zip(grid, results.items(), strict=True):
        _draw_batches(left, name, result)
        _draw_sides(right, result)
    first = next(iter(results.values()))
    figure.suptitle(f"{first['processor']}, {first['num_threads']} threads, torch {first['torch']}", fontsize=9)
    temporary = folder / f".{PICTURE}.new"
    figure.savefig(temporary, dpi=110, format="png")
    return temporary.replace(folder / PICTURE)


def _bounds(result: dict[str, Any]) -> dict[int, float]:
    """Return the seconds per image that arithmetic takes at least, by batch size."""
    return {row["batch_size"]: row["bound_seconds_per_image"] for row in result["timings"]}


def _draw_batches(axes: Any, name: str, result: dict[str, Any]) -> None:
    batch_sizes = sorted(_bounds(result))
    for k, (sampler, colour) in enumerate(_COLOURS.items()):
        rows = [r for r in result["timings"] if r["sampler"] == sampler and r["seconds_per_image"] is not None]
        places = [batch_sizes.index(row["batch_size"]) + (k - 2) * 0.16 for row in rows]
        heights = [1e3 * row["seconds_per_image"] for row in rows]
        axes.bar(places, heights, 0.16, color=colour, label=sampler)
        if sampler == CACHED:
            for place, height in zip(places, heights, strict=True):
                axes.annotate(f"{height:.2g}", (place, height), ha="center", va="bottom", fontsize=7)
    for place, (_, bound) in enumerate(sorted(_bounds(result).items())):
        label = "bound by arithmetic" if place == 0 else None
        axes.hlines(1e3 * bound, place - 0.45, place + 0.45, colors="black", linestyles="dotted", label=label)
    axes.set_yscale("log")
    axes.set_ylim(top=40 * axes.get_ylim()[1])  # room for the legend
    axes.set_xticks(range(len(batch_sizes)), [f"batch {size}" for size in batch_sizes])
    axes.set_ylabel("ms per image")
    channels, height, width = result["image_shape"]
    axes.set_title(f"{name}, {height} x {width}{' x 3' if channels == 3 else ''}", fontsize=9)
    axes.legend(fontsize=7, ncols=2)


def _draw_sides(axes: Any, result: dict[str, Any]) -> None:
    if not (found := result.get("sides", [])):
        axes.set_axis_off()
        return
    sides = [row["side"] for row in found]
    for key, sampler in (("naive_s_per_pixel", NAIVE), ("cached_s_per_pixel", CACHED)):
        axes.plot(sides, [1e6 * row[key] for row in found], "o-", color=_COLOURS[sampler], label=sampler)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_xlabel("image side, pixels")
    axes.set_ylabel("us per pixel, batch 1")
    axes.legend(fontsize=7)


def tabulate(results: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Write the same figures as Markdown, with the ratios of the compiled sampler; return the file."""
    first = next(iter(results.values()))
    lines = [f"{first['processor']}, {first['num_threads']} threads, torch {first['torch']}; ms per image.", ""]
    ratios = [f"{CACHED} against {base}" for base in (NAIVE, CROPPED)]
    lines += _table("pair", "batch", *SAMPLERS, *ratios, "times the bound")
    for name, result in results.items():
        for batch_size, bound in _bounds(result).items():
            rows = [row for row in result["timings"] if row["batch_size"] == batch_size]
            seconds = {row["sampler"]: row["seconds_per_image"] for row in rows}
            cells = [_short(1e3 * s) if (s := seconds.get(sampler)) else "" for sampler in SAMPLERS]
            own = seconds.get(CACHED)
            pairs = [(seconds.get(NAIVE), own), (seconds.get(CROPPED), own), (own, bound)]
            cells += [f"{_short(a / b)}x" if a and b else "" for a, b in pairs]
            lines.append(_row(f"`{name}`", batch_size, *cells))
    lines += ["", *_table("pair", "side", "cached, us per pixel", "naive, us per pixel")]
    for name, result in results.items():
        for row in result.get("sides", []):
            costs = [_short(1e6 * row[key]) for key in ("cached_s_per_pixel", "naive_s_per_pixel")]
            lines.append(_row(f"`{name}`", row["side"], *costs))
    atomic_write(folder / TABLES, "\n".join(lines) + "\n")
    return folder / TABLES


def _short(value: float) -> str:
    """Return three digits of a number, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(*heads: str) -> list[str]:
    return [_row(*heads), _row(*["---"] * len(heads))]


def main(folder: Annotated[Path, Argument()] = Path("reports/bench")) -> None:
    """Make a picture and tables of what `make bench` wrote."""
    results = read(folder)
    print(f"wrote {plot(results, folder)} and {tabulate(results, folder)}")


if __name__ == "__main__":
    sys.exit(command(main))
