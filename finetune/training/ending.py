"""What a training process does last."""

from __future__ import annotations

import atexit
import os
import sys

import torch.distributed


def end_process(status: int) -> int:
    """End a process that is in a process group with `status`; in any other return it.

    Python's own end can abort such a process after all its work is done (status 134, "terminate called without an
    active exception"): a thread of gloo that still holds a tensor asks for the interpreter's lock while the interpreter
    is taken apart. Leaving the group does not end those threads once a model was wrapped for distributed training, so
    exit handlers are run and output is written here, and the process ends without the rest.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return status
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
