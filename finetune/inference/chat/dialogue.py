"""One model answering in dialogues of several turns: verdict and mask from the prefill, then the text, streamed.

Each answer that is the first after new images carries their forensic tokens, as in training; later turns are text. The
speaker sees questions and its own earlier answers, never a reference answer. Without trained heads there is no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from finetune.data.dataset import Sample
from finetune.data.images import load_image
from finetune.inference.answers import read_answers
from finetune.inference.chat.image_memory import ImageMemory
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query
from finetune.schema import Turn
from finetune.special_tokens import IGNORE_INDEX, IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class ImageVerdict:
    """What an answer says about one image.

    Args:
        image: index among the dialogue's images.
        size_hw: of the upright original.
        score: probability in [0, 1] that the image is tampered; None without trained heads.
        label: `score` against the threshold, None with it.
        mask_scores: (H, W) float32 in [0, 1], or None without a mask head.
        text_label: verdict written in the text, None where none could be read.
    """

    image: int
    size_hw: tuple[int, int]
    score: float | None
    label: int | None
    mask_scores: np.ndarray | None = field(repr=False)
    text_label: int | None = None


@dataclass(frozen=True)
class Reply:
    """One answer.

    Args:
        text: without forensic tokens.
        content: as it goes into the dialogue's history, forensic tokens included.
        verdicts: one per image that no earlier answer concluded about.
        parse_ok: whether the text is the JSON of the template; None where no image was new.
        is_stopped: whether the user stopped it.
    """

    text: str
    content: str
    verdicts: tuple[ImageVerdict, ...]
    parse_ok: bool | None
    is_stopped: bool = False


class Speaker(Predictor):
    """A predictor that continues dialogues; see the module's description. Takes the arguments of `Predictor`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.memory = ImageMemory(self.bundle.base)

    @property
    def has_heads(self) -> bool:
        """Whether scores and masks mean anything: heads that are there and trained."""
        return bool(self.bundle.base.has_heads) and not self.bundle.has_new_heads

    def concluded(self, turns: Sequence[Turn]) -> int:
        """Number of images the assistant turns already conclude about: their runs of forensic tokens."""
        first = self.bundle.tokens.cls[0]
        return sum(turn.content.count(first) for turn in turns if turn.role == "assistant")

    def render(self, text: str, num_images: int) -> str:
        """An answer of another model as this one would have written it: text and the tokens of `num_images`."""
        run = self.bundle.tokens.run * num_images if self.has_heads else ""
        return run + text if self.layout == "tokens_first" else text + run

    def answer(
        self,
        dialogues: Sequence[Query],
        *,
        on_verdicts: Callable[[tuple[ImageVerdict, ...]], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Reply]:
        """The next answer of each dialogue, computed in one batch.

        Args:
            dialogues: all turns so far, the last one the question; assistant turns are earlier `Reply.content`s.
            on_verdicts: called before the first text (with `text_first`, after the last).
            on_text: called with each new piece of text; with it there may be one dialogue only.
            should_stop: asked after each token.

        Raises:
            DataFormatError: an image that cannot be read.
        """
        batch = [
            _Asked(query, [load_image(i, query.id) for i in query.images], self._new(query)) for query in dialogues
        ]
        was_stopped: list[bool] = []

        def stops() -> bool:
            if not was_stopped and should_stop is not None and should_stop():
                was_stopped.append(True)
            return bool(was_stopped)

        def announce() -> None:
            if on_verdicts is not None and self.has_heads and batch[0].num_new:
                on_verdicts(self._verdicts(batch, captured)[0])

        is_first = self.layout == "tokens_first"
        hooks: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([_Stop(stops)])}
        if on_text is not None:
            hooks["streamer"] = AnswerStreamer(self.bundle.tokenizer, announce if is_first else None, on_text)
        with self._lock, torch.inference_mode(), self.memory.used(), self._first_heads() as captured:
            written = self._generate_ids(self._inputs([self._prompt(asked) for asked in batch]), **hooks)
            if not is_first and self.has_heads and any(asked.num_new for asked in batch):
                written = [self._with_run(ids, asked.num_new) for ids, asked in zip(written, batch, strict=True)]
                captured.clear()
                self.model(
                    **self._inputs([self._answered(a, ids) for a, ids in zip(batch, written, strict=True)]),
                    logits_to_keep=1,
                )
            if not is_first:
                announce()
            verdicts = self._verdicts(batch, captured)
        return [
            self._reply(asked, ids, own, bool(was_stopped))
            for asked, ids, own in zip(batch, written, verdicts, strict=True)
        ]

    # ---- pieces ----

    def _new(self, query: Query) -> int:
        """Number of images the answer is to conclude about."""
        if self.has_heads:
            return len(query.images) - self.concluded(query.turns)
        last = max((i for i, turn in enumerate(query.turns) if turn.role == "assistant"), default=-1)
        return sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in query.turns[last + 1 :])

    def _prompt(self, asked: _Asked) -> Sample:
        """The dialogue up to the answer, with the forensic tokens of the new images where they come first.

        With `text_first` they are not there yet, and the heads refuse tokens for some images only, so that the earlier
        answers' tokens are left out as well until all are there.
        """
        is_first = self.layout == "tokens_first"
        query = asked.query
        if not is_first and asked.num_new:
            turns = tuple(Turn(turn.role, self.bundle.tokens.strip(turn.content)) for turn in query.turns)
            query = replace(query, turns=turns)
        run = self.bundle.tokens.run * asked.num_new if is_first and self.has_heads else ""
        return self._sample(query, asked.pictures, run)

    def _answered(self, asked: _Asked, ids: list[int]) -> Sample:
        """The dialogue with the answer, for the heads."""
        sample = self._sample(asked.query, asked.pictures, "")
        sample.input_ids = sample.input_ids + ids
        sample.labels = [IGNORE_INDEX] * len(sample.input_ids)
        return sample

    def _with_run(self, ids: list[int], count: int) -> list[int]:
        """An answer that holds the forensic tokens of `count` images; where it does not, they are put at its end."""
        tokens = self.bundle.tokens
        run = self.bundle.tokenizer.convert_tokens_to_ids(list(tokens.all))
        parts = (run[: tokens.num_cls], run[tokens.num_cls :])
        if all([token for token in ids if token in part] == part * count for part in parts):
            return ids
        return [token for token in ids if token not in run] + run * count

    def _verdicts(self, batch: Sequence[_Asked], captured: list[Any]) -> list[tuple[ImageVerdict, ...]]:
        """Of each dialogue's new images. Those of earlier turns are computed again by the way, and not repeated."""
        num_images = sum(len(asked.pictures) for asked in batch)
        runs = self.has_heads and any(asked.num_new for asked in batch)
        heads = self._read_heads(captured, num_images) if runs else None
        verdicts, first = [], 0
        for asked in batch:
            own = []
            for k in range(len(asked.pictures) - asked.num_new, len(asked.pictures)):
                score = heads.scores[first + k] if heads is not None else None
                label = None if score is None else int(score >= self.generation.score_threshold)
                mask = heads.masks[first + k] if heads is not None else None
                own.append(ImageVerdict(k, (asked.pictures[k].height, asked.pictures[k].width), score, label, mask))
            verdicts.append(tuple(own))
            first += len(asked.pictures)
        return verdicts

    def _reply(self, asked: _Asked, ids: list[int], verdicts: tuple[ImageVerdict, ...], is_stopped: bool) -> Reply:
        text = self._decode(ids)
        if self.layout == "text_first" and self.has_heads:
            content = self._with_tokens(ids)
        else:
            content = self.render(text, asked.num_new)
        if not asked.num_new:
            return Reply(text, content, verdicts, None, is_stopped)
        answers = read_answers(text, self.template, asked.num_new)
        if answers is not None:
            verdicts = tuple(replace(v, text_label=answer.label) for v, answer in zip(verdicts, answers, strict=True))
        return Reply(text, content, verdicts, answers is not None, is_stopped)

    def _with_tokens(self, ids: list[int]) -> str:
        """The text with its forensic tokens, without any other special token."""
        tokenizer = self.bundle.tokenizer
        keep = set(tokenizer.convert_tokens_to_ids(list(self.bundle.tokens.all)))
        dropped = set(tokenizer.all_special_ids) - keep
        return str(tokenizer.decode([token for token in ids if token not in dropped]))


@dataclass(frozen=True)
class _Asked:
    """A dialogue, its pictures, and how many of them (the last ones) the answer concludes about."""

    query: Query
    pictures: list[Image.Image]
    num_new: int


class _Stop(StoppingCriteria):
    """Ends generation of all rows when the user says so."""

    def __init__(self, stops: Callable[[], bool]) -> None:
        self._stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._stops(), device=input_ids.device, dtype=torch.bool)


class AnswerStreamer(BaseStreamer):
    """Hands text on as soon as its characters are complete; the first token means that the prefill is done.

    Not transformers' TextStreamer: that one holds text back until a space, which JSON may not have for long.
    """

    def __init__(self, tokenizer: Any, on_prefill: Callable[[], None] | None, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_prefill, self._on_text = tokenizer, on_prefill, on_text
        self._is_prompt = True
        self._ids: list[int] = []

    def put(self, value: Any) -> None:
        if self._is_prompt:  # generation begins with handing the prompt over
            self._is_prompt = False
            return
        if self._on_prefill is not None:
            self._on_prefill()
            self._on_prefill = None
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else the next token has the rest of a character's bytes
            self._emit(text)

    def end(self) -> None:
        self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _emit(self, text: str) -> None:
        self._ids = []
        if text:
            self._on_text(text)
