"""State of one interactive dialogue: models, images, turns, verdicts; each command is a method. No terminal in here.

The history is kept in neutral form, so that a dialogue can go on with another model: every answer is rendered for the
model that reads it, with the forensic tokens of that model where its training had them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.data.images import load_image
from finetune.data.token_checks import program_token
from finetune.errors import ConfigError, DataFormatError
from finetune.inference.chat.contestants import Contestants
from finetune.inference.chat.dialogue import ImageVerdict, Reply, Speaker
from finetune.inference.queries import Query
from finetune.inference.visualization import overlay_mask
from finetune.schema import ImageInput, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens


@dataclass(frozen=True)
class Exchange:
    """A question and its answer by the model of that name."""

    question: str
    reply: Reply
    model: str


class ChatSession:
    """A dialogue with one of several models.

    Args:
        models: at least one.
        system: system prompt; None takes each model's own.
    """

    def __init__(self, models: Contestants, system: str | None = None) -> None:
        self.models, self.system = models, system
        self.current = models.default
        self.images: list[ImageInput] = []
        self.exchanges: list[Exchange] = []
        self.attached: list[ImageInput] = []
        self._written: set[Path] = set()

    @property
    def speaker(self) -> Speaker:
        """The model that answers now."""
        return self.models.speaker(self.current)

    @property
    def verdicts(self) -> dict[int, ImageVerdict]:
        """What was said last about each image that has a score or a mask."""
        found = {}
        for exchange in self.exchanges:
            found.update({v.image: v for v in exchange.reply.verdicts if v.score is not None})
        return found

    def attach(self, path: str) -> tuple[str, tuple[int, int]]:
        """Add an image to the next message; its name and (H, W).

        Raises:
            DataFormatError: it cannot be read.
        """
        name = os.path.expanduser(_unquoted(path))
        image = ImageInput(path=name)
        picture = load_image(image)
        self.attached.append(image)
        return Path(name).name, (picture.height, picture.width)

    def ask(
        self,
        text: str,
        *,
        on_verdicts: Callable[[tuple[ImageVerdict, ...]], None],
        on_text: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Reply:
        """Send a message with the attached images; the exchange is kept unless it fails.

        Raises:
            ConfigError: text with control tokens, or another number of `<image>` than attached images.
            DataFormatError: an image that can no longer be read.
        """
        question = place_images(text, len(self.attached))
        images = (*self.images, *self.attached)
        query = Query("chat", images, (*self._history(), Turn("user", question)))
        try:
            (reply,) = self.speaker.answer([query], on_verdicts=on_verdicts, on_text=on_text, should_stop=should_stop)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the dialogue does not fit into the GPU's memory; /reset, or use smaller images"
            ) from error
        self.images, self.attached = list(images), []
        self.exchanges.append(Exchange(question, reply, self.current))
        return reply

    def reset(self) -> None:
        """Forget images and turns; system prompt and model stay."""
        self.images, self.attached, self.exchanges = [], [], []
        self.speaker.memory.clear()

    def switch(self, name: str) -> None:
        """Let another model answer from now on.

        Raises:
            ConfigError, ModelLoadError: no such model, or it cannot be loaded; the current one stays.
        """
        self.models.speaker(name)
        self.current = name

    def save_overlay(self, path: str) -> Path:
        """Write the last image with its mask laid over it; returns the file.

        Args:
            path: "" for `<image>_overlay.png` in the working directory, numbered where that exists.

        Raises:
            ConfigError: no image has a mask, or the file cannot be written.
        """
        with_mask = [v for v in self.verdicts.values() if v.mask_scores is not None]
        if not with_mask:
            raise ConfigError("no image of this dialogue has a mask yet; attach one with /image, and ask")
        verdict = max(with_mask, key=lambda v: v.image)
        image = self.images[verdict.image]
        target = (
            Path(os.path.expanduser(_unquoted(path))) if path else _free(f"{Path(image.path or 'image').stem}_overlay")
        )
        threshold = self.speaker.generation.mask_threshold
        assert verdict.mask_scores is not None
        overlay = overlay_mask(np.asarray(load_image(image)), verdict.mask_scores, threshold=threshold)
        self._write(lambda: Image.fromarray(overlay).save(target), target)
        return target

    def save(self, path: str) -> Path:
        """Write the dialogue as one record in the `conversations` format; returns the file.

        Raises:
            ConfigError: nothing to save, a file that is there already and not of this dialogue, another ending than
                .json and .jsonl, or the file cannot be written.
        """
        if not path:
            raise ConfigError("/save needs a file name, e.g. /save dialogue.json")
        if not self.exchanges:
            raise ConfigError("nothing to save: the dialogue is empty")
        target = Path(os.path.expanduser(_unquoted(path)))
        if target.suffix not in (".json", ".jsonl"):
            raise ConfigError(f"/save writes .json or .jsonl, not {target.name}; e.g. /save dialogue.json")
        record = self.record(target.parent)
        text = json.dumps(record, ensure_ascii=False) if target.suffix == ".jsonl" else _pretty([record])
        self._write(lambda: target.write_text(text + "\n", encoding="utf-8"), target)
        return target

    def _write(self, action: Callable[[], object], target: Path) -> None:
        """Write a file that is not there yet, or that this session has written."""
        if target.exists() and target.resolve() not in self._written:
            raise ConfigError(f"{target} exists; give another name")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            action()
        except (OSError, ValueError) as error:  # ValueError: Pillow, for a suffix it does not know
            raise ConfigError(f"{target} cannot be written: {error}") from error
        self._written.add(target.resolve())

    def record(self, folder: Path) -> dict[str, Any]:
        """The dialogue as a record, image paths relative to `folder` where they lie in it.

        Forensic tokens are kept where the answers hold the tokens of every image, as the readers demand.
        """
        speaker = self.speaker
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        answers = [self._rendered(exchange, speaker) for exchange in self.exchanges]
        if speaker.concluded([Turn("assistant", text) for text in answers]) != len(self.images):
            answers = [SpecialTokens().strip(text) for text in answers]
        for exchange, answer in zip(self.exchanges, answers, strict=True):
            turns += [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": answer}]
        said = {str(image): round(float(v.score or 0), 4) for image, v in self.verdicts.items()}
        models = list(dict.fromkeys(exchange.model for exchange in self.exchanges))
        return {
            "conversations": turns,
            "images": [_relative(image, folder) for image in self.images],
            "provenance": {"models": models, "scores": said},
        }

    # ---- pieces ----

    def _history(self) -> tuple[Turn, ...]:
        speaker = self.speaker
        turns = [Turn("system", self.system)] if self.system is not None else []
        for exchange in self.exchanges:
            turns += [Turn("user", exchange.question), Turn("assistant", self._rendered(exchange, speaker))]
        return tuple(turns)

    def _rendered(self, exchange: Exchange, speaker: Speaker) -> str:
        if exchange.model == self.current:
            return exchange.reply.content
        concluded = sum(v.score is not None for v in exchange.reply.verdicts)
        return speaker.render(exchange.reply.text, concluded)


def place_images(text: str, count: int) -> str:
    """`text` with `<image>` for each of `count` images: where the user put them, else before the text.

    Raises:
        ConfigError: another number of `<image>`, or control tokens, which only the program may write.
    """
    if found := program_token(text):
        raise ConfigError(f"the message holds {found}, which only the program may write; leave it out")
    placed = text.count(IMAGE_PLACEHOLDER)
    if placed not in (0, count):
        raise ConfigError(f"the message holds {placed} {IMAGE_PLACEHOLDER}, but {count} images are attached")
    return text if placed else IMAGE_PLACEHOLDER * count + text


def _unquoted(path: str) -> str:
    path = path.strip()
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


def _free(stem: str) -> Path:
    number, path = 1, Path(f"{stem}.png")
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}.png")
    return path


def _relative(image: ImageInput, folder: Path) -> str:
    if image.path is None:
        raise DataFormatError("an image without a file cannot be saved")
    path = Path(image.path).resolve()
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else str(path)


def _pretty(records: list[dict[str, Any]]) -> str:
    return json.dumps(records, ensure_ascii=False, indent=2)
