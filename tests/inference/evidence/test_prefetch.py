"""Images read ahead: in order, with their errors in place, never more in flight than agreed."""

from __future__ import annotations

import threading
import time

import pytest

from finetune.errors import DataFormatError
from finetune.inference.evidence.prefetch import prefetch


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_with_errors_in_their_place(workers: int) -> None:
    def load(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        if number % 4 == 1:
            raise DataFormatError("bad", record=str(number))
        return number * 10

    found = list(prefetch(range(20), load, workers))
    assert [item for item, _ in found] == list(range(20))
    for item, result in found:
        if item % 4 == 1:
            assert isinstance(result, DataFormatError)
            assert result.record == str(item)
        else:
            assert result == item * 10


def test_few_items_are_in_flight_and_a_bug_is_not_swallowed() -> None:
    taken: list[int] = []

    def numbers() -> object:
        for number in range(100):
            taken.append(number)
            yield number

    stream = prefetch(numbers(), lambda number: number, workers=2, ahead=3)  # type: ignore[arg-type]
    for _ in range(5):
        next(stream)
    assert len(taken) <= 5 + 2 * 3
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0], lambda number: 1 // number, workers=2))
