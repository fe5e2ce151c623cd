"""Training in a process of its own that dies, or is told to stop, at a chosen moment: real `kill -9`, real signals."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from finetune.config import RunConfig
from finetune.training import saving
from finetune.training.run import build_trainer

from transformers import TrainerCallback  # isort: skip


class At(TrainerCallback):
    """Sends this process a signal at one event of one step."""

    def __init__(self, event: str, step: int, number: int) -> None:
        self.event, self.step, self.number = event, step, number
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def killed_at(event: str, step: int) -> Callable[[RunConfig], None]:
    """A run that is killed at a callback event, e.g. `on_pre_optimizer_step` after `step` finished steps."""

    def body(config: RunConfig) -> None:
        trainer = build_trainer(config)[0]
        trainer.add_callback(At(event, step, signal.SIGKILL))
        trainer.train(trainer.find_resume_point(config.train.resume))

    return body


def killed_while_saving(step: int) -> Callable[[RunConfig], None]:
    """A run that is killed when every file of `checkpoint-step` is written but it is not yet in its place."""

    def body(config: RunConfig) -> None:
        publish = saving.publish

        def killing(staged: Any, *arguments: Any) -> Any:
            if staged.name == f"checkpoint-{step}":
                os.kill(os.getpid(), signal.SIGKILL)
            return publish(staged, *arguments)

        saving.publish = killing
        trainer = build_trainer(config)[0]
        trainer.train(trainer.find_resume_point(config.train.resume))

    return body


def run_in_child(body: Callable[[Any], Any], *arguments: Any) -> int:
    """Fork, call, and return how the child ended: its status, or minus the signal that killed it.

    A fork instead of a new interpreter saves the seconds of importing torch; nothing here has started threads.
    """
    child = os.fork()
    if child == 0:
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch refuses new threads in a fork: "Invalid thread pool"
        status = 1
        try:
            status = body(*arguments) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
