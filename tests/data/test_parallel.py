"""The ordered map keeps order, reads its input lazily, and passes exceptions on in their turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from finetune.data.parallel import num_workers, ordered_map
from finetune.errors import ForensicsError


def _square(value: int) -> int:
    if value == 13:
        raise ValueError("thirteen")
    return value * value


def _die(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(ordered_map(_square, range(12), workers, chunk=2)) == [v * v for v in range(12)]


def test_input_is_read_only_a_little_ahead() -> None:
    taken = 0

    def count() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 10_001):  # noqa: B007
            yield 2

    results = ordered_map(_square, count(), 2, chunk=4, ahead=2)
    next(results)
    assert taken <= 4 * 2 * 2
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_comes_after_the_results_before_it(workers: int) -> None:
    results = ordered_map(_square, [1, 13, 2], workers, chunk=1)
    assert next(results) == 1
    with pytest.raises(ValueError, match="thirteen"):
        next(results)


def test_a_killed_process_is_named() -> None:
    with pytest.raises(ForensicsError, match="worker process was killed"):
        list(ordered_map(_die, range(4), 2))


def test_zero_means_every_core() -> None:
    assert num_workers(0) >= 1
    assert num_workers(3) == 3
