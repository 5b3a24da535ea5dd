"""Results as pictures: time against size, the roofline, and memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.report import IDEAL, OURS, Record, setting

SLOTS = ["#2a78d6", "#e07b39", "#3a9e6d", "#b0569c", "#8a7a2f", "#6f6f6f", "#c0392b"]
"""One colour per contender, the same in all pictures."""


def available() -> bool:
    return find_spec("matplotlib") is not None


def draw(record: Record, folder: Path) -> list[Path]:
    """The pictures of ``record`` in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(
        dict.fromkeys(r["contender"] for r in record["results"] if r["seconds"] and r["suite"] not in ("ops", "host"))
    )
    colours = {name: SLOTS[i % len(SLOTS)] for i, name in enumerate(names)}
    written = []
    for name, figure in {
        "time": times(plt, record, colours),
        "roofline": roofline(plt, record, colours),
        "memory": memory(plt, record, colours),
    }.items():
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=80, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def lines_of(record: Record, field: Any) -> dict[str, dict[str, dict[int, float]]]:
    """``field(result)`` by group, contender and size, of groups with more than one size."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for result in record["results"]:
        value = field(result) if result["suite"] == "layers" and result["size"] else None
        if value is not None:
            found.setdefault(result["group"], {}).setdefault(result["contender"], {})[result["size"]] = value
    return {
        group: lines for group, lines in found.items() if len({size for line in lines.values() for size in line}) > 1
    }


def panels(plt: Any, lines: dict[str, Any], colours: dict[str, str], label: str, title: str) -> Any:
    """One panel per group, a line per contender over the layer's inputs."""
    if not lines:
        return None
    figure, axes = plt.subplots(1, len(lines), figsize=(4.6 * len(lines), 3.6), squeeze=False)
    for axis, (group, contenders) in zip(axes[0], lines.items(), strict=True):
        for name, line in contenders.items():
            sizes = sorted(line)
            axis.plot(sizes, [line[size] for size in sizes], marker="o", ms=4, lw=1.6, color=colours[name], label=name)
        what, _, size = group.rpartition(", by ")
        axis.set(title=what, xlabel=size)
        axis.title.set_fontsize(10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(label)
    handles = {name: plt.Line2D([], [], color=colour, marker="o", ms=4) for name, colour in colours.items()}
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", ncols=4, fontsize=8, bbox_to_anchor=(0.5, -0.01)
    )
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def times(plt: Any, record: Record, colours: dict[str, str]) -> Any:
    def value(result: Record) -> float | None:
        if result["contender"] == IDEAL and result["seconds"]:
            return 1.0
        return result["ratios"][IDEAL][1] if IDEAL in result["ratios"] else None

    return panels(plt, lines_of(record, value), colours, f"time / {IDEAL}", setting(record))


def memory(plt: Any, record: Record, colours: dict[str, str]) -> Any:
    def value(result: Record) -> float | None:
        return None if result["saved_bytes"] is None else result["saved_bytes"] / 2**20

    return panels(plt, lines_of(record, value), colours, "MiB kept for the backward", setting(record))


def roofline(plt: Any, record: Record, colours: dict[str, str]) -> Any:
    """FLOP/s over FLOP per byte, as shares of the measured product: bounded by the copy on the left, the product above."""
    points = [r for r in record["results"] if r["intensity"] and r["gflop_s"] and r["contender"] in colours]
    if not points:
        return None
    top, copy = record["ceilings"]["matmul_gflop_s"], record["ceilings"]["copy_gb_s"]
    figure, axis = plt.subplots(figsize=(6.4, 4))
    left, right = (pick(r["intensity"] for r in points) for pick in (min, max))
    xs = sorted({left / 4, top / copy, right * 2})
    axis.plot(xs, [min(1.0, copy * x / top) for x in xs], color="#444444", lw=1.2)
    for name in colours:
        mine = [r for r in points if r["contender"] == name]
        axis.plot(
            [r["intensity"] for r in mine], [r["gflop_s"] / top for r in mine],
            linestyle="", marker="o" if name == OURS else "s", ms=5, color=colours[name], label=name,
        )  # fmt: skip
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that has to be moved",
        ylabel="share of a plain product's FLOP/s",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    axis.set_title(setting(record), fontsize=9)
    return figure
