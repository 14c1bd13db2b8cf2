"""The roofline of the int8 linear layers: what a call does, against what the machine allows.

A call of M rows takes 2·M·N·K operations. It reads the int8 weight once, N·K bytes, and its rows
once, M·K values of 2 or 4 bytes; what it writes is left out, since the roofs are those of reading.
Operations by bytes is the intensity, about 2·M as long as M is far below N. A machine that reads B
bytes a second and does P operations a second does at most min(P, intensity · B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import Machine
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

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    tiers = [tier for tier in _COLOURS if any(point.tier == tier for point in points)]
    left, right = 1.0, max(point.intensity for point in points) * 3.2
    bottom = min(point.tops for point in points) / 1.7
    top = max([*(rate / 1e12 for rate in peaks.int8.values()), *(p.tops for p in points)]) * 1.9
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    _draw_roofs(axes, peaks, tiers, left, right)
    _draw_points(axes, points, tiers)
    _mark_rows(axes, points, bottom)
    axes.set_xlabel("int8 operations for each byte read (the weight once, and the rows)")
    axes.set_ylabel("int8 operations a second, $10^{12}$")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="minor", length=2, color=_GREY)
    where = f"{machine.cpu}, {machine.threads} threads; torch {machine.versions['torch']}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(f"{where}, {machine.date}", loc="left", fontsize=9, color=_GREY, pad=10)
    return figure


def _draw_roofs(
    axes: Any, peaks: Peaks, tiers: Sequence[str], left: float, right: float
) -> None:
    """A slope a bandwidth, up to the highest roof, and a level an instruction set."""
    roofs = {tier: rate / 1e12 for tier, rate in peaks.int8.items() if tier in tiers}
    slopes = {size: rate / 1e12 for size, rate in peaks.read.items()}
    highest = max(roofs.values(), default=axes.get_ylim()[1])
    fastest = max(slopes.values(), default=float("inf"))
    for size, rate in slopes.items():
        end = min(highest / rate, right)
        axes.plot([left, end], [left * rate, end * rate], color=_LINE, linewidth=1.4, zorder=1)
        kind = "cache" if size <= CACHE_BYTES else "memory"
        _along_slope(axes, left * 1.12, rate, f"{kind}: {rate * 1e3:,.0f} GB/s")
    for tier, roof in roofs.items():
        start = max(left, roof / fastest)
        axes.plot([start, right], [roof] * 2, color=_COLOURS[tier], linewidth=1.6, zorder=1)
        axes.annotate(
            f"{_NAMES.get(tier, tier)} on registers: {roof:.2f} TOPS",
            *((right, roof), (-4, 4), "data", "offset points"),
            ha="right", va="bottom", fontsize=9, color=_COLOURS[tier],
        )  # fmt: skip


def _along_slope(axes: Any, x: float, rate: float, text: str) -> None:
    """`text` on the line y = rate · x, turned as the line is."""
    axes.annotate(
        text, (x, x * rate), (0, 3), textcoords="offset points", fontsize=9, color=_LINE,
        rotation=45, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip


def _draw_points(axes: Any, points: Sequence[Point], tiers: Sequence[str]) -> None:
    """Filled where the weight fits the cache, hollow where memory has to deliver it."""
    for tier in tiers:
        for in_cache in (True, False):
            chosen = [p for p in points if (p.tier, p.in_cache) == (tier, in_cache)]
            axes.scatter(
                [p.intensity for p in chosen],
                [p.tops for p in chosen],
                s=42 if in_cache else 46,
                marker="o" if in_cache else "D",
                facecolor=_COLOURS[tier] if in_cache else "white",
                edgecolor="white" if in_cache else _COLOURS[tier],
                linewidth=0.7 if in_cache else 1.5,
                zorder=3,
            )
    handles = [_handle(_COLOURS[tier], f"qnn, {tier}") for tier in tiers]
    handles.append(_handle(_GREY, "weight fits the last-level cache"))
    if not all(point.in_cache for point in points):
        handles.append(_handle(_GREY, "weight comes from memory", hollow=True))
    axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)


def _handle(colour: str, label: str, *, hollow: bool = False) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], linestyle="", label=label, marker="D" if hollow else "o", markersize=6.5,
        markerfacecolor="white" if hollow else colour, markeredgecolor=colour,
    )  # fmt: skip


def _mark_rows(axes: Any, points: Sequence[Point], bottom: float) -> None:
    """`M = 8` below the points of 8 rows, which have nearly the same intensity."""
    columns: Mapping[int, list[Point]] = {
        m: [p for p in points if p.rows == m] for m in sorted({p.rows for p in points})
    }
    for m, column in columns.items():
        x = min(p.intensity for p in column)
        y = min(p.tops for p in column)
        axes.annotate(
            f"M = {m}", (x, y), (0, -9), textcoords="offset points",
            ha="center", va="top", fontsize=8.5, color=_GREY, annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(bottom=bottom / 1.4)
