"""An ordered map over processes that reads its input lazily and keeps few items in flight, so memory stays flat.

`Executor.map` submits everything at once and would hold a whole data set. Nothing here knows what the items are.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from finetune.errors import ForensicsError

T = TypeVar("T")
R = TypeVar("R")


def num_workers(requested: int) -> int:
    """`requested` processes, or one per usable core where it is 0."""
    if requested:
        return requested
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    *,
    chunk: int = 8,
    ahead: int = 3,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[R]:
    """`function` of every item, in the order of the items, computed in `workers` spawned processes.

    With one worker everything runs in this process. A caller's script needs the usual `if __name__ == "__main__":`.

    Args:
        function: picklable; an exception it raises is raised here, in its turn.
        items: read as needed, at most `workers * ahead * chunk` beyond what was given out.
        workers: 0 means one per core.
        chunk: items sent together, to spread the cost of sending.
        ahead: chunks in flight per worker.
        initializer, initargs: run once in every process before its first item.

    Raises:
        ForensicsError: a process was killed (usually for want of memory).
    """
    count = num_workers(workers)
    if count == 1:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, items)
        return
    source = iter(items)
    executor = ProcessPoolExecutor(count, get_context("spawn"), _start, (initializer, initargs))
    in_flight: deque[Future[list[R]]] = deque()
    try:
        while True:
            while len(in_flight) < count * ahead and (piece := list(itertools.islice(source, chunk))):
                in_flight.append(executor.submit(_apply, function, piece))
            if not in_flight:
                return
            yield from in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise ForensicsError("a worker process was killed, perhaps for want of memory; use fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with(sentinel: int) -> None:
    """A killed parent cannot end its workers, which would wait for items, or write files, for ever."""
    wait([sentinel])
    os._exit(1)


def _apply(function: Callable[[T], R], items: list[T]) -> list[R]:
    return [function(item) for item in items]
