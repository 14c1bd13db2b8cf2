"""The roofline of the int8 linear layers: what a call does, against what the machine allows.

A call of M rows takes 2·M·N·K operations. It reads the int8 weight once, N·K bytes, and its rows
once, M·K values of 2 or 4 bytes; what it writes is left out, since the roofs are those of reading.
Operations by bytes is the intensity, about 2·M as long as M is far below N. A machine that reads B
bytes a second and does P operations a second does at most min(P, intensity · B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from machine import Machine, counted
from peaks import CACHE_BYTES, Peaks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour an instruction set, for its roof and for its points.
_COLOURS = {
    "amx": "#aa3377",
    "avx512_vnni": "#ee6677",
    "avx_vnni": "#ccbb44",
    "avx2": "#4477aa",
    "portable": "#228833",
}
_NAMES = {"amx": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2"}
_LINE, _GREY = "#333333", "#8a8a8a"


@dataclass(frozen=True)
class Point:
    """A timed call of one tier, `tier`; `in_cache` if its weight fits the last-level cache."""

    tier: str
    rows: int
    intensity: float
    tops: float
    in_cache: bool


def intensity(m: int, n: int, k: int, value_bytes: int) -> float:
    """Operations for each byte that is read."""
    return 2 * m * n * k / (n * k + value_bytes * m * k)


def roofline_chart(points: Sequence[Point], peaks: Peaks, machine: Machine, title: str) -> Figure:
    """Both axes logarithmic: the roofs of reading and of computing, and the points below them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10.5, 6.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    tiers = [tier for tier in _COLOURS if any(point.tier == tier for point in points)]
    roofs = {tier: rate / 1e12 for tier, rate in peaks.int8.items() if tier in tiers}
    slopes = {size: rate / 1e12 for size, rate in peaks.read.items()}
    tops = [point.tops for point in points]
    left = 0.6
    floor = min([min(tops) / 2, *(0.7 * left * rate for rate in slopes.values())])
    axes.set_xlim(left, max(point.intensity for point in points) * 2.2)
    axes.set_ylim(floor, max([*roofs.values(), *tops]) * 2.4)

    _mark_rows(axes, points)
    _draw_points(axes, points, tiers)
    axes.set_xlabel("int8 operations for each byte read: the weight once, and the rows")
    axes.set_ylabel("int8 operations a second, TOPS")
    for axis, style in ((axes.xaxis, "{:,.0f}"), (axes.yaxis, "{:g}")):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _, style=style: style.format(value))
        axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(which="both", color=_GREY, labelcolor=_LINE)
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26)
    where = (
        f"{machine.cpu}, {counted(machine.threads, 'thread')}; torch {machine.versions['torch']}"
    )
    axes.text(0, 1.025, f"{where}; {machine.date}", transform=axes.transAxes, color=_GREY)
    handles = _handles(tiers, hollow=not all(point.in_cache for point in points))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9.5, frameon=False
    )
    _draw_roofs(axes, roofs, slopes)
    return figure


def _mark_rows(axes: Any, points: Sequence[Point]) -> None:
    """A pale band for the points of as many rows, which have nearly the same intensity."""
    for m in sorted({point.rows for point in points}):
        columns = [point.intensity for point in points if point.rows == m]
        left, right = min(columns) / 1.12, max(columns) * 1.12
        axes.axvspan(left, right, color=_LINE, alpha=0.05, linewidth=0, zorder=0)
        axes.text(
            math.sqrt(left * right), 0.985, f"M = {m}" if m == 1 else f"{m}",
            transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=10, color=_LINE,
        )  # fmt: skip


def _draw_roofs(axes: Any, roofs: Mapping[str, float], slopes: Mapping[int, float]) -> None:
    """A slope a bandwidth, up to the highest roof, and a level an instruction set."""
    left, right = axes.get_xlim()
    highest = max(roofs.values(), default=axes.get_ylim()[1])
    for size, rate in slopes.items():
        end = min(highest / rate, right)
        axes.plot([left, end], [left * rate, end * rate], color=_LINE, linewidth=1.5, zorder=1)
        kind = "cache" if size == CACHE_BYTES else "memory"
        axes.annotate(
            f"{kind}: {rate * 1e3:,.0f} GB/s",
            *((left * 1.05, left * 1.05 * rate), (0, 4)), textcoords="offset points",
            fontsize=9.5, color=_LINE, rotation=_slope(axes), rotation_mode="anchor",
        )  # fmt: skip
    steepest = max(slopes.values(), default=math.inf)
    for tier, roof in roofs.items():
        start = max(left, roof / steepest)
        axes.plot([start, right], [roof, roof], color=_COLOURS[tier], linewidth=1.8, zorder=1)
        axes.annotate(
            f"{_NAMES.get(tier, tier)}: {roof:.2f} TOPS",
            *((right, roof), (-2, 4)), textcoords="offset points",
            ha="right", va="bottom", fontsize=9.5, color=_COLOURS[tier],
        )  # fmt: skip


def _slope(axes: Any) -> float:
    """Degrees by which a line of constant bandwidth rises on the page."""
    axes.figure.draw_without_rendering()  # decides how large the axes are
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _draw_points(axes: Any, points: Sequence[Point], tiers: Sequence[str]) -> None:
    """Filled where the weight fits the cache, hollow where memory delivers it, or most of it."""
    for tier in reversed(tiers):
        for in_cache in (True, False):
            chosen = [p for p in points if (p.tier, p.in_cache) == (tier, in_cache)]
            axes.scatter(
                [p.intensity for p in chosen],
                [p.tops for p in chosen],
                s=46,
                marker="o" if in_cache else "D",
                facecolor=_COLOURS[tier] if in_cache else "white",
                edgecolor="white" if in_cache else _COLOURS[tier],
                linewidth=0.7 if in_cache else 1.6,
                zorder=3,
            )


def _handles(tiers: Sequence[str], *, hollow: bool) -> list[Any]:
    """Of the legend: a colour a tier, and what a hollow point is."""
    from matplotlib.lines import Line2D

    looks = [(_COLOURS[tier], _COLOURS[tier], "o", f"qnn, {tier}") for tier in tiers]
    looks.append((_GREY, _GREY, "o", "weight fits the last-level cache"))
    if hollow:
        looks.append(("white", _GREY, "D", "weight larger than that cache"))
    return [
        Line2D(
            [], [], linestyle="", marker=marker, markersize=7, label=label,
            markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.4,
        )
        for face, edge, marker, label in looks
    ]  # fmt: skip
