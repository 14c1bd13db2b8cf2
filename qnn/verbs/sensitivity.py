"""`sensitivity`: what quantising each layer alone does to the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from qnn.verbs.calibrate import call, is_namedtuple
from qnn.verbs.checks import require_module
from qnn.verbs.choose import Row, choose
from qnn.verbs.compare import _Power, _tensors
from qnn.verbs.convert import SchemeMap, maker, planned
from qnn.verbs.inventory import size
from qnn.verbs.patterns import Patterns
from qnn.verbs.progress import Meter, check_progress
from qnn.verbs.tables import aligned, chart
from qnn.verbs.trial import EvalFn, Run, Trial, Unit, bytes_of, evaluated, number, trying, units_of

Metric = Callable[[Any, Any], Any]
Key = Literal["error", "saved", "error_per_byte", "name"]
_WHO = "qnn.sensitivity"


class Sensitivity:
    """The table that `sensitivity` returns, worst first: `print` it, iterate over its rows, or ask
    for one by name, `table["head"]`, or `table["head", "int8"]` where there are several schemes.
    """

    def __init__(self, rows: Iterable[Row], score: float | None, bytes_before: int) -> None:
        """`score` and `bytes_before` are those of the float model."""
        self.rows = list(rows)
        self.score, self.bytes_before = score, bytes_before

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: str | tuple[str, str]) -> Row:
        found = [row for row in self.rows if key in (row.name, (row.name, row.scheme))]
        if not found:
            names = ", ".join(dict.fromkeys(row.name for row in self.rows))
            raise KeyError(f"qnn.Sensitivity has no row {key!r}; its rows are {names}.")
        if len(found) > 1:
            schemes = ", ".join(row.scheme for row in found)
            raise KeyError(f"qnn.Sensitivity: {key!r} has the schemes {schemes}; ask for one.")
        return found[0]

    def sort(self, by: Key = "error") -> Sensitivity:
        """The table in another order: the worst error first, or the most bytes `"saved"`, or the
        most `"error_per_byte"` saved, or by name.

        Raises:
            ValueError: another key.
        """
        if by not in ("error", "saved", "error_per_byte", "name"):
            raise ValueError(
                "qnn.Sensitivity.sort takes 'error', 'saved', 'error_per_byte' or 'name', got "
                f"{by!r}."
            )
        ordered = sorted(self.rows, key=lambda row: getattr(row, by), reverse=by != "name")
        return Sensitivity(ordered, self.score, self.bytes_before)

    def choose(self, budget_bytes: int) -> dict[str, str | None]:
        """The scheme of each layer with which the model takes at most `budget_bytes`, parameters
        and buffers: a scheme map for `qnn.convert`; None is float.

        Greedy: from float, the step with the least additional `error` for each byte that it saves
        is taken, to any of the schemes that were measured, until the budget holds; then steps are
        undone, the one with the most error first, where the bytes that are left allow it. Errors
        are taken to add up, as independent noise does.

        Raises:
            ValueError: the budget cannot be reached, with the least that can.
        """
        return choose(self.rows, self.bytes_before, budget_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        rows = [{**asdict(row), "layers": dict(row.layers)} for row in self.rows]
        return {"rows": rows, "score": self.score, "bytes_before": self.bytes_before}

    def __str__(self) -> str:
        scored = self.score is not None
        head = ["layer", "scheme", "SQNR dB", *(["score", "drop"] if scored else [])]
        table = [[*head, "before", "after"]]
        for row in self.rows:
            cells = [row.name or "(model)", row.scheme]
            cells.append("-" if row.sqnr is None else f"{row.sqnr:7.1f}")
            if row.score is not None:
                cells += [f"{row.score:.6g}", f"{row.drop:.3g}"]
            table.append([*cells, size(row.bytes_before), size(row.bytes_after)])
        total = f"float model: {size(self.bytes_before)}"
        total += f", score {self.score:.6g}" if scored else ""
        return "\n".join([*aligned(table), total])

    __repr__ = __str__

    def plot(self, path: str | Path) -> Path:
        """Write a bar chart in the table's order, first row on top; the format follows the file's
        ending. Needs matplotlib.
        """
        label = "score lost" if self.score is not None else "SQNR of the output, dB"
        several = len({row.scheme for row in self.rows}) > 1
        bars = [
            (f"{row.name or '(model)'}{f' ({row.scheme})' if several else ''}", value)
            for row in self.rows
            if (value := row.sqnr if row.drop is None else row.drop) is not None
            and math.isfinite(value)
        ][::-1]
        figure, axes = chart("qnn.Sensitivity.plot", len(bars))
        axes.barh([name for name, _ in bars], [value for _, value in bars], color="#4477aa")
        axes.set_xlabel(f"{label}, this layer alone quantised")
        figure.savefig(path)
        return Path(path)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    scheme: str | SchemeMap | Sequence[str | SchemeMap] | None = None,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    on_unsupported: Literal["error", "skip"] = "error",
    groups: Mapping[str, Patterns] | None = None,
    metric: Metric | None = None,
    eval_fn: EvalFn | None = None,
    progress: bool | str = True,
) -> Sensitivity:
    """For each layer that `qnn.convert` would take: the error of the model's output when that layer
    alone is quantised, and its bytes.

    Layers are quantised in the model itself, one after the other, and each is put back before the
    next, so there is never a second model in memory. At the end, also after an exception, the model
    is as it was: the same layers in all places that name them, the same modes and buffers, and
    nothing recorded by observers. It is run once for each layer and batch, in evaluation mode and
    without gradients, on one device; outputs of the float model on all batches are held.

    Layers that share a weight, and an attention with its output projection, are one row.

    Args:
        model: a float model, or one that was prepared and calibrated: then the scheme and the
            ranges are those that its layers know, and it is compared with itself in float, without
            fake-quantisation.
        batches: as in `qnn.calibrate`; may be left out where there is an `eval_fn`.
        scheme: as in `qnn.convert`, `"int8"` if None; or a list of those, each of which is tried on
            each layer.
        include, exclude, on_unsupported: as in `qnn.convert`.
        groups: `{name: patterns}`; the layers that a group's patterns match are quantised together.
        metric: `(float_output, output) -> number` for each batch, higher is better, such as an
            accuracy or a cosine; its mean is the row's score. The float model is scored against
            itself.
        eval_fn: `model -> number`, higher is better: the row's score.
        progress: as in `qnn.calibrate`.

    Returns:
        A row for each layer, worst first: by the drop of the score, or by SQNR where there is
        neither `metric` nor `eval_fn`.

    Raises:
        ValueError: what `qnn.convert` would raise; no batches; both `metric` and `eval_fn`; either
            gives no number; an output without float tensors, and no score.
        TypeError: an argument of the wrong kind.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> table = sensitivity(model, [torch.randn(16, 64)], "int8")
    >>> sorted(row.name for row in table), table["0"].bytes_before
    (['0', '2'], 16640)
    >>> quantised = qnn.convert(model, table.choose(budget_bytes=7_500))
    """
    require_module(_WHO, model)
    check_progress(_WHO, progress)
    held = _checked(batches, metric, eval_fn)
    several = isinstance(scheme, Sequence) and not isinstance(scheme, str)
    rows, score = list[Row](), None
    schemes: Any = scheme if several else [scheme]
    for each in schemes:
        plan = planned(model, each, include=include, exclude=exclude, on_unsupported=on_unsupported)
        units = units_of(_WHO, model, plan, groups)
        with trying(_WHO, model, plan, maker) as (trial, run):
            outputs = _Outputs(trial, run, held, metric, eval_fn)
            score = outputs.score
            meter = Meter(_WHO, "layer", len(units), progress)
            rows += [_row(trial, unit, outputs) for unit in meter.each(units)]
    if not rows:
        raise ValueError("qnn.sensitivity: scheme is an empty list; name one scheme or more.")
    return Sensitivity(rows, score, bytes_of(model)).sort()


def _checked(batches: Any, metric: Any, eval_fn: Any) -> list[Any]:
    if isinstance(batches, (torch.Tensor, Mapping)) or is_namedtuple(batches):
        raise TypeError(f"{_WHO}: batches is a {type(batches).__name__}, one batch; pass [batch].")
    for name, function in (("metric", metric), ("eval_fn", eval_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{_WHO}: {name} must be a function, got {type(function).__name__}.")
    if metric is not None and eval_fn is not None:
        raise ValueError(f"{_WHO}: metric and eval_fn both give a score; pass one of them.")
    held = list(() if batches is None else batches)
    if not held and (batches is not None or eval_fn is None):
        raise ValueError(f"{_WHO}: there are no batches to run the model on.")
    return held


class _Outputs:
    """The float model's outputs and score, and those of the model as it stands beside them."""

    def __init__(
        self,
        trial: Trial,
        run: Run,
        batches: list[Any],
        metric: Metric | None,
        eval_fn: EvalFn | None,
    ) -> None:
        self.trial, self.run, self.batches = trial, run, batches
        self.metric, self.eval_fn = metric, eval_fn
        self.floats = [self._output(batch) for batch in batches]
        tensors = [_tensors(output) for output in self.floats]
        if metric is None:  # a cache in the output is let go, and the next batch may overwrite it
            self.floats = [[tensor.clone() for tensor in each] for each in tensors]
        self.power = bool(batches) and all(tensors)
        if not self.power and metric is None and eval_fn is None:
            raise ValueError(
                f"{_WHO}: the model's output has no float tensors to compare; pass metric= or "
                "eval_fn=."
            )
        scores = [metric(output, output) for output in self.floats] if metric else []
        self.score = self._score(scores)

    def measure(self) -> tuple[float | None, float | None]:
        """SQNR in dB, and score."""
        power, scores = _Power(), list[Any]()
        for batch, expected in zip(self.batches, self.floats, strict=True):
            output = self._output(batch)
            if self.power:
                power.add_all(expected, output)
            if self.metric is not None:
                scores.append(self.metric(expected, output))
        return power.db if self.power else None, self._score(scores)

    def _output(self, batch: Any) -> Any:
        return self.run(lambda: call(self.trial.model, batch))

    def _score(self, scores: list[Any]) -> float | None:
        if self.metric is not None:
            numbers_ = [number(f"{_WHO}: metric", score) for score in scores]
            return math.fsum(numbers_) / len(numbers_)
        if self.eval_fn is None:
            return None
        return evaluated(_WHO, self.trial, self.run, self.eval_fn)


def _row(trial: Trial, unit: Unit, outputs: _Outputs) -> Row:
    before = trial.bytes_of(unit)
    trial.quantize(unit)
    try:
        after = trial.bytes_of(unit)
        sqnr, score = outputs.measure()
    finally:
        trial.put_back()
    drop = None if score is None else cast(float, outputs.score) - score
    scheme = "+".join(dict.fromkeys(unit.schemes.values()))
    return Row(unit.name, scheme, sqnr, score, drop, before, after, unit.schemes)
