"""Tables, CSV files and charts of what `harness.measure` returns."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import LEFT_OUT, Measurement, command_line, over
from machine import Machine, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour a family, a hatch a mode, and a lighter shade for bfloat16: the same in all charts.
_COLOURS = {
    "float": "#777777",
    "qnn int8": "#ee6677",
    "qnn int8_static": "#aa3377",
    "qnn int8_weight": "#ffaabb",
    "qnn int16": "#882255",
    "torch.ao int8": "#ccbb44",
    "torchao int8": "#4477aa",
    "torchao PT2E": "#4477aa",
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


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def case_table(rows: Sequence[Measurement], baseline: str) -> str:
    """All that was measured in one case; the speed-up is the baseline's time by the variant's."""
    head = ("variant", "median ms", "min ms", "speed-up", "TOPS", "SQNR dB", "remark")
    body = [
        (
            row.variant,
            number(row.median_ms),
            number(row.min_ms),
            "baseline" if row.variant == baseline else times(row.speedup),
            number(row.tops, 2),
            "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            row.remark,
        )
        for row in rows
    ]
    return table(head, body, left=(0, 6))


def size_table(cases: Mapping[str, Sequence[Measurement]], *, remarks: bool = False) -> str:
    """A row a variant, a column a case: median ms and speed-up; the lowest SQNR; the remarks."""
    body, left_out = [], []
    for rows in zip(*cases.values(), strict=True):
        if all(row.status == "unavailable" for row in rows):
            left_out += [rows[0].variant] if rows[0].note == LEFT_OUT else []
            continue
        cells = [
            ("-" if row.status == "unavailable" else row.status)
            if row.median_ms is None
            else f"{number(row.median_ms)} ({times(row.speedup)})"
            for row in rows
        ]
        noise = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        found = dict.fromkeys(row.remark for row in rows if row.median_ms is not None)
        more = ["; ".join(found)] if remarks else []
        body.append((rows[0].variant, *cells, f"{min(noise):.1f}" if noise else "-", *more))
    head = ("median ms (speed-up)", *cases, "SQNR dB", *(["remark"] if remarks else []))
    text = table(head, body, left=(0, len(head) - 1) if remarks else (0,))
    if not left_out:
        return text
    return f"{text}\n\nNot measured in this size (`--everywhere` adds them): {', '.join(left_out)}."


def without_time(rows: Sequence[Measurement]) -> str:
    """Every variant that was tried and has no time, why, and in how many cases."""
    absent = [row for row in rows if row.median_ms is None and row.note != LEFT_OUT]
    counts = Counter((row.variant, row.remark) for row in absent)
    listed = [f"- {name}: {remark} (cases: {count})" for (name, remark), count in counts.items()]
    return "\n".join(["## Without a time", "", *(listed or ["None."])])


# -- ratios and aims -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pick:
    """Rows of a family, in a mode and a precision; where these are "", in any but `but`."""

    family: str
    mode: str = ""
    precision: str = ""
    but: str = ""

    def of(self, rows: Iterable[Measurement]) -> list[Measurement]:
        return [
            row
            for row in rows
            if row.family == self.family
            and row.mode in (self.mode or row.mode,)
            and row.precision in (self.precision or row.precision,)
            and row.mode != self.but
        ]

    def best(self, rows: Iterable[Measurement]) -> Measurement | None:
        """The fastest that was timed."""
        timed = [row for row in self.of(rows) if row.median_ms is not None]
        return min(timed, key=lambda row: row.median_ms or 0.0, default=None)


@dataclass(frozen=True)
class Aim:
    """`ours` is to be at least `goal` times as fast as `theirs`, in each of `cases`."""

    what: str
    ours: Pick
    theirs: Pick
    goal: float
    cases: Sequence[str]

    def judged(self, rows: Sequence[Measurement]) -> tuple[str, str]:
        """The lowest ratio and the verdict; why there is none where a case has no time."""
        ratios, loads = [], []
        for case in self.cases:
            of_case = [row for row in rows if row.case == case]
            tried = self.ours.of(of_case)
            if not tried:
                continue
            theirs, ours = self.theirs.best(of_case), self.ours.best(of_case)
            if theirs is None or ours is None:
                lacking = [*tried, *self.theirs.of(of_case)]
                why = next((r.remark for r in lacking if r.median_ms is None), "nothing to compare")
                return "-", f"not judged: {case}: {why}"
            ratios.append(over(theirs, ours))
            loads.append(ours.other_load or 0.0)
        if not ratios:
            return "-", "not measured"
        verdict = "met" if min(ratios) >= self.goal else "**missed**"
        if max(loads) > QUIET:
            verdict = "not judged, on a machine that was not quiet"
        if len(ratios) < len(self.cases):
            missing = len(self.cases) - len(ratios)
            verdict += f", {missing} of {len(self.cases)} cases not measured"
        return times(min(ratios)), verdict


def aims_table(aims: Iterable[Aim], rows: Sequence[Measurement]) -> str:
    body = []
    for aim in aims:
        theirs = " ".join(filter(None, (aim.theirs.family, aim.theirs.precision)))
        ours = " ".join(filter(None, (aim.ours.family, aim.ours.mode)))
        body.append((aim.what, ours, theirs, f"{aim.goal:g}x", *aim.judged(rows)))
    head = ("times as fast", "what", "as", "aim", "lowest", "verdict")
    return table(head, body, left=(0, 1, 2, 5))


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


Part = tuple[list[Measurement], str]  # rows for the CSV file, and text for the page


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
    about = f"{machine}. {quietness(rows)} {machine.missing()}".strip()
    write(out, name, title, rows, [about, f"![{title}]({name}.png)", *parts])
    print(f"\n{machine}\n{quietness(rows)}\nwritten: {out / name}.csv, {out / name}.md")
    for stem, chart in charts.items():
        try:
            chart(machine).savefig(out / f"{stem}.png", dpi=120)
            print(f"written: {out / stem}.png")
        except ModuleNotFoundError as error:
            print(f"not written: {out / stem}.png, since {error.name} is not installed")


def write(
    out: Path,
    name: str,
    title: str,
    rows: Sequence[Measurement],
    parts: Sequence[str],
    where: Mapping[str, Any] | None = None,
) -> None:
    """The CSV file, with the machine and `where` in each row, and the page."""
    out.mkdir(parents=True, exist_ok=True)
    more = {**(where or {}), **Machine.here().columns()}
    write_csv(out / f"{name}.csv", [{**asdict(row), **more} for row in rows])
    head = [f"# {title}", f"`{command_line()}`; every figure is in [{name}.csv]({name}.csv)."]
    (out / f"{name}.md").write_text("\n\n".join([*head, *parts]) + "\n")


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Floats with six digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()}
            writer.writerow(cells)


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
    return f"{number(row.median_ms)} ms, {times(row.speedup)}{sqnr}"


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
