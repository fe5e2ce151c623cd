"""One process at a time at an output: a lock that goes with its process, however that ends.

It keeps two processes from mixing their files; which run a folder belongs to is decided elsewhere.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ForensicsError


@contextmanager
def locked(file: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file for this process; it is removed at the end, and one that a killed process left holds nobody up.

    Args:
        file: in a folder that is there; beside the output, or in it where the output's own folder stays in its place.
        refusal: what is said where another process holds it: what that one is doing, and what to do.

    Raises:
        ForensicsError: another process holds it.
    """
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ForensicsError(refusal) from error
        if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
            break
        os.close(descriptor)  # removed by its last holder between our two calls
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
