"""The results: one JSON, tables in Markdown, and pictures of the loss and of the perplexities.

python report.py --from out --out results/smollm2-135m
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evaluate import NO_NOISE, PCM, POLYNOMIAL, ROWS
from journal import entries
from matplotlib.figure import Figure

CONDITIONS = (NO_NOISE, POLYNOMIAL, *PCM)
TRAININGS = {"trained": "all weights", "adapters": "adapters"}
"""Folders of train.py, and what they trained."""
SHOWN_STEPS = 500
"""Of a curve that is kept, at most."""

Rows = dict[str, dict[str, list[dict[str, float]]]]


def collect(folder: Path) -> dict[str, Any]:
    """All numbers that the other commands have left in ``folder``."""
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    if (speed := folder / "throughput.json").exists():
        found["throughput"] = json.loads(speed.read_text("utf-8"))
    for name in TRAININGS:
        lines = entries(folder / name, "training")
        if lines:
            every = -(-len(lines) // SHOWN_STEPS)
            found.setdefault("curves", {})[name] = lines[every - 1 :: every]
            found.setdefault("layers", {})[name] = entries(folder / name, "analysis")[-1]
    return found


def values(rows: Rows, row: str, condition: str, text: str) -> list[float]:
    """Of each chip."""
    return [numbers[text] for numbers in rows[row].get(condition, [])]


def cell(numbers: list[float]) -> str:
    if len(numbers) < 2:
        return f"{numbers[0]:.2f}" if numbers else "-"
    return f"{fmean(numbers):.2f} ± {stdev(numbers):.2f}"


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    rows: Rows = found["rows"]
    chips = max(len(row.get(POLYNOMIAL, [])) for row in rows.values())
    over_time = max(len(row.get(list(PCM)[-1], [])) for row in rows.values())
    yield f"Perplexity: mean ± deviation over {chips} chips (polynomial) and {over_time} chips (PCM)."
    for text, sequences in found["settings"]["sequences"].items():
        yield ""
        yield f"| {text}, {sequences} x {found['settings']['length']} tokens | {' | '.join(CONDITIONS)} |"
        yield "| --- |" + " ---: |" * len(CONDITIONS)
        for row in rows:
            yield f"| {ROWS[row]} | {' | '.join(cell(values(rows, row, name, text)) for name in CONDITIONS)} |"
    yield ""
    yield from losses(found, rows)
    if (speed := found.get("throughput")) is not None:
        peaks = [peak for peak in speed["peak_bytes"].values() if peak is not None]
        memory = f"; peak memory {peaks[1] / 2**30:.2f} GiB against {peaks[0] / 2**30:.2f} GiB" if peaks else ""
        fast = speed["tokens_per_second"]
        yield (
            f"Training on tiles: {fast['analog']:,.0f} tokens/s against {fast['digital']:,.0f} of the digital model in the same "
            f"mode ({speed['way']}, {speed['precision']}, {speed['batch']} x {speed['length']}, {speed['device']}), "
            f"{speed['ratio']:.2f} of it{memory}."
        )
    for name, curve in found.get("curves", {}).items():
        last = curve[-1]
        yield (
            f"Training of {TRAININGS[name]}: {last['step']} steps, {last['tokens'] / 1e6:.2f} million tokens in "
            f"{last['seconds']:.0f} s; KL divergence at the end {last['loss']:.4f} nats."
        )


def losses(found: dict[str, Any], rows: Rows) -> Iterator[str]:
    """What chips cost, in perplexity above the original's, and which part of it is left after training."""
    if not {"original", "calibrated", "trained"} <= rows.keys() or not rows["trained"].get(POLYNOMIAL):
        return
    yield f"| perplexity lost on chips ({POLYNOMIAL}) | (b) untrained | (d) trained | (d) / (b) |"
    yield "| --- | ---: | ---: | ---: |"
    for text in found["settings"]["sequences"]:
        (best,) = values(rows, "original", NO_NOISE, text)
        lost = [fmean(values(rows, row, POLYNOMIAL, text)) - best for row in ("calibrated", "trained")]
        yield f"| {text} | {lost[0]:.2f} | {lost[1]:.2f} | {lost[1] / lost[0]:.2f} |"
    yield ""


def plot_curves(found: dict[str, Any], path: Path) -> None:
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, curve in found["curves"].items():
        axes.plot([line["tokens"] for line in curve], [line["loss"] for line in curve], label=TRAININGS[name])
    axes.set(xlabel="tokens", ylabel="KL divergence from the teacher, nats", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_perplexities(found: dict[str, Any], path: Path) -> None:
    rows: Rows = found["rows"]
    sequences = found["settings"]["sequences"]
    figure = Figure(figsize=(4 * len(sequences), 4), layout="constrained")
    for axes, text in zip(figure.subplots(1, len(sequences), squeeze=False)[0], sequences, strict=True):
        for row in rows:
            seen = [(name, values(rows, row, name, text)) for name in CONDITIONS if rows[row].get(name)]
            spread = [stdev(numbers) if len(numbers) > 1 else 0.0 for _, numbers in seen]
            axes.errorbar(
                [name for name, _ in seen], [fmean(n) for _, n in seen], spread, marker="o", capsize=3, label=row
            )
        axes.set(title=text, yscale="log")
        axes.tick_params(axis="x", rotation=30)
    axes.legend()
    figure.supylabel("perplexity")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="folder", type=Path, required=True, help="with what the other commands have written"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    given = parser.parse_args(arguments)

    found = collect(given.folder)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(found, indent=1), "utf-8")
    text = "\n".join(tables(found)) + "\n"
    (given.out / "results.md").write_text(text, "utf-8")
    print(text)
    plot_perplexities(found, given.out / "perplexity.png")
    if "curves" in found:
        plot_curves(found, given.out / "curves.png")


if __name__ == "__main__":
    main()
