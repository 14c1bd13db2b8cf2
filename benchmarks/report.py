"""Tables, CSV files and charts of what `harness.measure` returns."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import Machine, Measurement, command_line, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour a family, a hatch a mode, and a lighter shade for bfloat16: the same in all charts.
_COLOURS = {
    "float": "#777777",
    "qnn int8": "#ee6677",
    "qnn int8_static": "#aa3377",
    "qnn int8_weight": "#ffaabb",
    "torch.ao int8": "#ccbb44",
    "torchao int8": "#4477aa",
    "ONNX Runtime": "#aaddee",
    "ONNX Runtime int8": "#66ccee",
    "OpenVINO": "#99cc99",
    "OpenVINO int8": "#228833",
    "oneDNN int8": "#222222",
}
_HATCHES = {
    "eager": "////", "compiled+frozen": "....", "tier": "xxxx", "16-bit": "oooo",
    "fbgemm": "....", "onednn": "xxxx", "qnnpack": "----",
}  # fmt: skip

# Cores that other processes may take. With one busy on a machine of two, an OpenMP region of 0.1 ms
# takes 8 to 12 ms, since its threads wait for each other.
QUIET = 0.1


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """A Markdown table that reads well as plain text; the columns in `left` are flush left."""
    lines, flush_left = [list(head), *map(list, rows)], set(left)
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i in flush_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i in flush_left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; `-` for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def speedup(row: Measurement) -> str:
    return "-" if row.speedup is None else f"{row.speedup:.2f}x"


def decibels(row: Measurement) -> str:
    return "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"


def case_table(rows: Sequence[Measurement], baseline: str) -> str:
    """All that was measured in one case; the speed-up is the baseline's time by the variant's."""
    head = ("variant", "median ms", "min ms", "speed-up", "TOPS", "SQNR dB", "remark")
    body = [
        (
            row.variant,
            number(row.median_ms),
            number(row.min_ms),
            "baseline" if row.variant == baseline else speedup(row),
            number(row.tops, 2),
            decibels(row),
            row.remark,
        )
        for row in rows
    ]
    return table(head, body, left=(0, 6))


def quietness(rows: Sequence[Measurement]) -> str:
    """Whether other processes disturbed the timing."""
    loads = {row.case: row.other_load for row in rows if row.other_load is not None}
    if not loads:
        return "Whether other processes ran meanwhile is not known."
    noisy = sum(load > QUIET for load in loads.values())
    found = f"Other processes kept at most {max(loads.values()):.2f} cores busy meanwhile."
    if not noisy:
        return found
    return f"{found} **Not a quiet machine in {noisy} of {len(loads)} cases: do not quote them.**"


# -- files ---------------------------------------------------------------------------------------


def save(
    out: Path,
    name: str,
    title: str,
    rows: Sequence[Measurement],
    parts: Sequence[str],
    charts: Mapping[str, Callable[[Machine], Figure]],
) -> None:
    """Write `name.csv`, `name.md` (of `parts`) and, with matplotlib, the charts into `out`.

    The chart called `name` is shown at the top, the others wherever `parts` show them.
    """
    machine = Machine.here()
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / f"{name}.csv", rows, machine)
    head = [
        f"# {title}",
        f"`{command_line()}`; every figure is in [{name}.csv]({name}.csv).",
        f"{machine}. {quietness(rows)} {machine.missing()}".strip(),
        f"![{title}]({name}.png)",
    ]
    (out / f"{name}.md").write_text("\n\n".join([*head, *parts]) + "\n")
    print(f"\n{machine}\n{quietness(rows)}\nwritten: {out / name}.csv, {out / name}.md")
    for stem, chart in charts.items():
        try:
            chart(machine).savefig(out / f"{stem}.png", dpi=120)
            print(f"written: {out / stem}.png")
        except ModuleNotFoundError as error:
            print(f"not written: {out / stem}.png, since {error.name} is not installed")


def _write_csv(path: Path, rows: Sequence[Measurement], machine: Machine) -> None:
    """A row a measurement, each with the machine, the threads and the versions."""
    records = [
        {
            key: f"{value:.6g}" if isinstance(value, float) else value
            for key, value in {**asdict(row), **machine.columns()}.items()
        }
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


# -- charts --------------------------------------------------------------------------------------


def _bar_style(row: Measurement) -> dict[str, Any]:
    return {
        "facecolor": _COLOURS[row.family],
        "alpha": 0.55 if row.precision == "bf16" else 1.0,
        "hatch": _HATCHES.get(row.mode.partition(" ")[0], ""),
        "edgecolor": "white",
        "linewidth": 0.3,
    }


def _bar_text(row: Measurement) -> str:
    if row.median_ms is None:
        return row.remark[:60]
    sqnr = "" if row.sqnr_db is None or math.isinf(row.sqnr_db) else f", {row.sqnr_db:.0f} dB"
    return f"{number(row.median_ms)} ms, {speedup(row)}{sqnr}"


def times_chart(rows: Sequence[Measurement], title: str, machine: Machine) -> Figure:
    """One case: a horizontal bar a variant, as long as its median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    longest = max((row.median_ms for row in rows if row.median_ms is not None), default=1.0)
    for y, row in enumerate(rows):
        length = row.median_ms or 0.0
        axes.barh(y, length, **_bar_style(row))
        axes.text(length + longest / 100, y, _bar_text(row), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.25)
    axes.set_xlabel("median time of a call, ms (shorter is better)")
    _finish(figure, [axes], title, machine)
    return figure


def speedups_chart(
    panels: Mapping[str, Mapping[str, Sequence[Measurement]]],
    title: str,
    baseline: str,
    machine: Machine,
) -> Figure:
    """`{panel: {group: rows}}`: bars up or down from the baseline, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.0 + 2.2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (panel, groups) in zip(grid, panels.items(), strict=True):
        for x, rows in enumerate(groups.values()):
            _draw_group(axes, x, [row for row in rows if row.variant != baseline])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda s, _: f"{s:g}x" if s >= 1 else f"1/{1 / s:g}x")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.55, len(groups) - 0.45)
        axes.set_title(panel, loc="left", fontsize=10)
        axes.grid(axis="y", linewidth=0.3)
        axes.set_axisbelow(True)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _finish(figure, grid, f"{title}: speed-up over {baseline} (higher is better)", machine)
    return figure


def _draw_group(axes: Any, x: int, rows: Sequence[Measurement]) -> None:
    width = 0.85 / max(1, len(rows))
    for i, row in enumerate(rows):
        left = x - 0.425 + i * width
        label = row.variant if x == 0 else None
        height = 0.0 if row.speedup is None else row.speedup - 1
        axes.bar(left, height, width, bottom=1, align="edge", label=label, **_bar_style(row))
        if row.speedup is None:
            axes.text(left + width / 2, 1.05, row.status, rotation=90, ha="center", fontsize=6)


def _finish(figure: Figure, all_axes: Iterable[Any], title: str, machine: Machine) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    where = (
        f"{machine.cpu}, {counted(machine.threads, 'thread')}; torch {machine.versions['torch']}"
    )
    figure.suptitle(f"{title}\n{where}", fontsize=10)
