"""Text retention: how far a model's language has moved from the base model's, on prompts of everyday knowledge.

The base model continues fixed prompts greedily, once; at evaluations the trained model is asked how likely it finds
those continuations. The drift is the difference in cross-entropy per token: 0 as long as it speaks like the base, about
log(vocabulary) when its text has lost all meaning. Images play no part.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import ConfigError
from finetune.models.loading import Bundle

logger = logging.getLogger(__name__)

PROMPTS = (
    "What is the capital of France, and which river runs through it?",
    "Explain in one sentence why the sky is blue.",
    "List three things one needs to bake bread.",
    "Translate into English: 今天天气很好。",
    "请用一句话介绍一下长江。",
    "水在标准大气压下多少摄氏度沸腾？",
    "把下面的句子改写得更礼貌：把窗户关上。",
    "请列出三种常见的水果。",
)
LENGTH = 24
"""Tokens of a continuation, at most."""
WARN_ABOVE = 0.5
"""Drift in nats per token from which an evaluation warns: each token is then e^0.5 = 1.6 times less likely."""
REFERENCE = "text_retention.json"


class TextRetention:
    """Measures the drift of one run.

    Args:
        out_dir: the reference is kept in `text_retention.json` there, so that a resumed run is held against the same.
        start: folder of the model that the run starts from. Where a run of this project made it and its language
            moved, that run's reference is the base model's, and is taken over.
    """

    def __init__(self, bundle: Bundle, out_dir: str | Path, start: str | Path | None = None) -> None:
        self.bundle = bundle
        self.file = Path(out_dir) / REFERENCE
        self.start = None if start is None else Path(start).resolve().parent / REFERENCE
        self.rows: list[tuple[list[int], list[int]]] = []  # prompt ids, continuation ids; empty: nothing is measured
        self.base_loss = 0.0

    def prepare(self, model: Any, resumed_from: str | None, is_main: bool) -> None:
        """The base model's continuations: from a file where there is one, else generated now; written to `out_dir`.

        Call on every rank: under ZeRO-3 a forward pass is a step of all of them. In a resumed run that trains whole
        weights the base model is gone: without a file nothing is measured, and a warning says so.
        """
        places = [self.file, Path(resumed_from).resolve().parent / REFERENCE] if resumed_from is not None else []
        saved = _from_main(lambda: _first_saved([*places, *([] if self.start is None else [self.start])]), is_main)
        if saved is not None:
            self.rows = [(row["prompt"], row["continuation"]) for row in saved["rows"]]
            self.base_loss = saved["loss"]
        elif resumed_from is not None and self.bundle.model is self.bundle.base:
            logger.warning(
                "%s is missing and the base model's weights have been trained on: what the base said is not known any "
                "more, so the text drift is not measured; put the file back, or set train.text_retention: false",
                self.file,
            )
            return
        else:
            with _evaluating(model), _as_base(self.bundle):
                prompts = [self._prompt_ids(text) for text in PROMPTS]
                self.rows = list(zip(prompts, self._continue(model, prompts), strict=True))
                self.base_loss = self._loss(model)
        if is_main and not (resumed_from is not None and self.file.is_file()):
            rows = [{"prompt": prompt, "continuation": continuation} for prompt, continuation in self.rows]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps({"loss": self.base_loss, "rows": rows}), encoding="utf-8")

    def drift(self, model: Any) -> float:
        """Cross-entropy of the continuations now minus then, nats per token."""
        with _evaluating(model):
            return self._loss(model) - self.base_loss

    def _prompt_ids(self, text: str) -> list[int]:
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.bundle.tokenizer.encode(turn, add_special_tokens=False))

    def _continue(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy continuations, all prompts at once; each ends with the end-of-turn token or at `LENGTH`."""
        end = self.bundle.tokenizer.eos_token_id
        rows = [list(prompt) for prompt in prompts]
        for _ in range(LENGTH):
            logits, _ = self._logits(model, rows)
            for row, values in zip(rows, logits, strict=True):
                row.append(int(values[len(row) - 1].argmax()))
        found = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        return [row[: row.index(end) + 1] if end in row else row for row in found]

    def _loss(self, model: Any) -> float:
        logits, ids = self._logits(model, [prompt + continuation for prompt, continuation in self.rows])
        losses = []
        for row, (prompt, continuation) in enumerate(self.rows):
            place = slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
            targets = ids[row, len(prompt) : len(prompt) + len(continuation)]
            losses.append(F.cross_entropy(logits[row, place].float(), targets, reduction="none"))
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def _logits(self, model: Any, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and ids (B, T) of rows padded on the right."""
        device = self.bundle.base.device
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.bundle.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        ids, mask = ids.to(device), mask.to(device)
        kinds = torch.zeros_like(ids)
        return model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, use_cache=False).logits, ids


def _first_saved(files: Sequence[Path]) -> Any:
    """The content of the first of `files` that is there, else None."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no valid JSON; put a sound copy back, or remove it") from error
    logger.info("text drift is measured against %s", file)
    return saved


def _from_main(read: Callable[[], Any], is_main: bool) -> Any:
    """The main process's reading on every rank: folders may not look the same everywhere, and ranks must agree."""
    found: list[Any] = [None, None]
    if is_main:
        try:
            found = [read(), None]
        except ConfigError as error:
            found = [None, str(error)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ConfigError(found[1])
    return found[0]


@contextlib.contextmanager
def _evaluating(model: Any) -> Any:
    """No dropout inside; the mode is as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _as_base(bundle: Bundle) -> Any:
    """The base model inside: a PEFT model's adapter is switched off."""
    return contextlib.nullcontext() if bundle.model is bundle.base else bundle.model.disable_adapter()
