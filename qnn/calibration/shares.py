"""The statistics of several processes, added up after each has calibrated with its own batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.calibration.statistics import Observer


class Shares:
    """The statistics of `points` while each process of a group calibrates with batches of its own:
    what each sees from here on is added up by `join`.
    """

    def __init__(self, points: Iterable[FakeQuantize], group: Any) -> None:
        self.group = group
        self.points = [p for p in points if p.observing and p.observer is not None]
        self.before = [copy.deepcopy(observer) for observer in self._observers()]
        self.unset = [not bool(point.scale.detach().any()) for point in self.points]
        for observer in self._observers():
            observer.reset()

    def _observers(self) -> list[Observer]:
        return [point.observer for point in self.points if point.observer is not None]

    def undo(self) -> None:
        """Nothing is added up: this process has what it has seen, before and now."""
        for observer, before in zip(self._observers(), self.before, strict=True):
            observer.merge(before)

    def join(self, failure: Exception | None, batches: int) -> int:
        """Add up, on all processes alike; how many batches there were.

        Raises:
            RuntimeError: another process has failed, or has other observation points.
        """
        mine = (
            failure and f"{type(failure).__name__}: {failure}",
            batches,
            [f"{point.name} {point.spec}" for point in self.points],
            [_state(observer) for observer in self.before],
            [_state(observer) for observer in self._observers()],
        )
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, mine, group=self.group)
        if failure is not None:
            raise failure
        for rank, (failed, _, points, *_) in enumerate(every):
            if failed:
                raise RuntimeError(
                    f"qnn.calibrate: process {rank} of {len(every)} has failed, and nothing was "
                    f"added up: {failed}"
                )
            if points != every[0][2]:
                raise RuntimeError(
                    f"qnn.calibrate: process {rank} of {len(every)} has other observation points "
                    f"than process 0: {_first_difference(points, every[0][2])}. Prepare the same "
                    "model in each, or pass sync=False to calibrate each for itself."
                )
        for index, (point, unset) in enumerate(zip(self.points, self.unset, strict=True)):
            observer = self._observers()[index]
            observer.reset()
            # What the processes had in common counts once.
            for state in [
                *_distinct([each[3][index] for each in every]),
                *(e[4][index] for e in every),
            ]:
                observer.merge(_read(observer, state))
            point.refresh(anew=unset)
        return sum(each[1] for each in every)


State = dict[str, torch.Tensor]


def _state(observer: Observer) -> State:
    return {name: buffer.cpu() for name, buffer in observer.named_buffers()}


def _read(like: Observer, state: State) -> Observer:
    made: Observer = like.empty()
    for name, value in state.items():
        made._buffers[name] = value.to(like.count.device)
    return made


def _distinct(states: list[State]) -> list[State]:
    kept: list[State] = []
    for state in states:
        if not any(_same(state, other) for other in kept):
            kept.append(state)
    return kept


def _same(one: State, two: State) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def _first_difference(one: list[str], two: list[str]) -> str:
    if len(one) != len(two):
        return f"{len(one)} and not {len(two)}"
    return next(f"{a!r} and not {b!r}" for a, b in zip(one, two, strict=True) if a != b)
