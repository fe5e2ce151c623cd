"""Images opened ahead of the model by a few threads, in order, each with its error where it cannot be used.

Pillow decodes without holding the interpreter, so threads are enough and nothing is copied between processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from finetune.errors import DataFormatError

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    items: Iterable[T], load: Callable[[T], R], workers: int = 0, ahead: int = 2
) -> Iterator[tuple[T, R | DataFormatError]]:
    """(item, what `load` gave, or the `DataFormatError` it raised) for each item, in order.

    Args:
        workers: threads; 0 loads in the caller's own, when asked.
        ahead: items in flight per thread, which bounds the memory.
    """

    def attempt(item: T) -> R | DataFormatError:
        try:
            return load(item)
        except DataFormatError as error:
            return error

    if workers < 1:
        for item in items:
            yield item, attempt(item)
        return
    source = iter(items)
    in_flight: deque[tuple[T, Future[R | DataFormatError]]] = deque()
    executor = ThreadPoolExecutor(workers, "prefetch")
    try:
        while True:
            for item in itertools.islice(source, workers * ahead - len(in_flight)):
                in_flight.append((item, executor.submit(attempt, item)))
            if not in_flight:
                return
            item, future = in_flight.popleft()
            yield item, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
