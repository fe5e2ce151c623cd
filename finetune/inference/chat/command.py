"""`forensics chat` in a terminal: reads lines, runs commands, streams answers.

A mistake costs one line and the chat goes on; Ctrl-C stops an answer, Ctrl-D leaves. What a command does stands in
`session`, what is said in `wording`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import glob
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.errors import ConfigError, ForensicsError
from finetune.inference.chat.contestants import contestants
from finetune.inference.chat.dialogue import ImageVerdict
from finetune.inference.chat.session import ChatSession
from finetune.inference.chat.terminal import StreamWrapper
from finetune.inference.chat.wording import (
    COMMANDS,
    default_language,
    help_text,
    label_word,
    say,
    score_table,
    verdict_line,
)


def chat_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics chat` without --script; exit status 0."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # hints about sampling flags of a generation_config.json would stand in the dialogue
    models = contestants(arguments)
    language = arguments.language or default_language()
    session = ChatSession(models, arguments.system)
    loop = ChatLoop(session, language)
    _prepare_readline(models.names)
    _ = session.speaker  # a folder that cannot be loaded ends the program, not the first question
    loop.greet()
    loop.run()
    return 0


class ChatLoop:
    """Lines in, lines out.

    Args:
        session: the dialogue.
        language: `zh` or `en`, of the messages.
    """

    def __init__(self, session: ChatSession, language: str) -> None:
        self.session, self.language = session, language
        self._stop = False

    def greet(self) -> None:
        """One line on what to do, one where the model has no heads."""
        print(say("welcome", self.language, self.session.current))
        self._note_heads()

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while True:
            try:
                line = input(self._prompt())
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print(f"\n{say('hint', self.language)}")
                continue
            try:
                if not self.handle(line):
                    return
            except ForensicsError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print(f"\n{say('stopped', self.language)}")

    def handle(self, line: str) -> bool:
        """Do what one line says; False to leave.

        Raises:
            ForensicsError: it cannot be done; the dialogue is as before.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, _, argument = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/mask": lambda path: print(say("saved", self.language, self.session.save_overlay(path))),
            "/score": lambda _: self._score(),
            "/reset": lambda _: self._reset(),
            "/system": self._system,
            "/adapter": self._adapter,
            "/save": lambda path: print(say("saved", self.language, self.session.save(path))),
            "/help": lambda _: print(help_text(self.language)),
        }
        if name not in actions:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise ConfigError(f"no command {name}; {advice}")
        actions[name](argument.strip())
        return True

    # ---- commands ----

    def _image(self, path: str) -> None:
        if not path:
            raise ConfigError("/image needs a file, e.g. /image photo.jpg")
        name, (height, width) = self.session.attach(path)
        print(say("attached", self.language, name, width, height))

    def _score(self) -> None:
        verdicts = self.session.verdicts
        if not verdicts:
            print(say("no_verdict" if self.session.speaker.has_heads else "no_heads", self.language))
            return
        named = [(self._name(verdict), verdict) for _, verdict in sorted(verdicts.items())]
        print(score_table(named, self.session.speaker.generation.mask_threshold, self.language))

    def _reset(self) -> None:
        self.session.reset()
        print(say("reset", self.language))

    def _system(self, text: str) -> None:
        if text:
            self.session.system = text
        current = self.session.system
        print(say("system", self.language, self.session.speaker.template.system if current is None else current))

    def _adapter(self, name: str) -> None:
        if name:
            self.session.switch(name)
            print(say("now", self.language, name))
            self._note_heads()
            return
        for model in self.session.models.models.values():
            mark = "*" if model.name == self.session.current else " "
            print(f"{mark} {model.name}  ({model.kind}, {model.path})")

    # ---- asking ----

    def _ask(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        wrapper = StreamWrapper(_write, width - 1, indent="  ")
        self._stop = False
        try:
            with self._stoppable():
                reply = self.session.ask(
                    text, on_verdicts=self._show, on_text=wrapper.feed, should_stop=lambda: self._stop
                )
        finally:
            wrapper.close()
        if not reply.text and not reply.is_stopped:
            print(f"  {say('empty', self.language)}")
        if reply.is_stopped:
            print(f"  {say('stopped', self.language)}")
        for verdict in reply.verdicts:
            if verdict.label is not None and verdict.text_label not in (None, verdict.label):
                word = label_word(int(verdict.text_label or 0), self.language)
                print(f"  [{verdict.image + 1}] {say('says', self.language, word)}")

    def _show(self, verdicts: tuple[ImageVerdict, ...]) -> None:
        threshold = self.session.speaker.generation.mask_threshold
        for verdict in verdicts:
            print(f"  {verdict_line(verdict, self._name(verdict), threshold, self.language)}", flush=True)

    def _name(self, verdict: ImageVerdict) -> str:
        image = [*self.session.images, *self.session.attached][verdict.image]
        return Path(image.path or "").name

    def _note_heads(self) -> None:
        if not self.session.speaker.has_heads:
            print(say("no_heads", self.language))

    def _prompt(self) -> str:
        attached = "".join(f" +{Path(image.path or '').name}" for image in self.session.attached)
        return f"{self.session.current}{attached}> "

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C ends the answer after its next token and keeps what was written, a second one drops it."""

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prepare_readline(names: list[str]) -> None:
    """Line editing with history, and Tab for commands, model names and files. Not there on every platform."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> Any:
        line = readline.get_line_buffer()
        if " " not in line:
            found = [f"{name} " for name in COMMANDS if name.startswith(text)]
        elif line.startswith("/adapter "):
            found = [name for name in names if name.startswith(text)]
        else:
            matches = glob.glob(glob.escape(os.path.expanduser(text)) + "*")
            found = sorted(path + "/" * os.path.isdir(path) for path in matches)
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
