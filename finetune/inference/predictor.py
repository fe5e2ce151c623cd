"""From images to predictions: verdict and mask from one prefill pass, the text by generation after it.

The predictor sees questions only (`Query`), never a target or a reference answer. With `tokens_first` the forensic
tokens are part of the prompt; with `text_first` the model writes its answer first and the heads read its tokens. Where
the heads read the vision tower (`heads.source: vision`) they need no text at all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.config import GenerationConfig
from finetune.data.answer_polygons import Coordinates, PolygonFrame
from finetune.data.chat import Segment, encode, segments
from finetune.data.collator import MODEL_KEYS, ForensicCollator
from finetune.data.dataset import Sample, num_image_tokens, processed_sizes
from finetune.data.image_frame import processed_size
from finetune.data.images import load_image
from finetune.data.masks import polygons_from_mask
from finetune.data.template import Template, load_template
from finetune.errors import ConfigError
from finetune.inference.answers import read_answers
from finetune.inference.queries import Query, batched
from finetune.inference.tta import IDENTITY, VIEWS, MeanMap, View
from finetune.models.loading import Bundle
from finetune.schema import Polygon, Prediction, VerdictSource


@dataclass
class _HeadResult:
    """Heads of one batch: score and (H, W) float32 scores for each of the N images, None where no head ran.

    raw: the score before calibration, None without one. operations: as `Prediction` has them.
    """

    scores: list[float | None]
    masks: list[np.ndarray | None]
    raw: list[float | None]
    operations: list[dict[str, float] | None]

    @classmethod
    def empty(cls, num_images: int) -> _HeadResult:
        return cls([None] * num_images, [None] * num_images, [None] * num_images, [None] * num_images)


class _HeadMeans:
    """Means of what the heads say of a batch over its copies, of which nothing else is kept."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._cls_sum: Tensor | None = None
        self.num_copies = 0
        self.cls_images: list[int] = []
        self.maps: dict[int, MeanMap] = {}
        self.operations: dict[int, dict[str, float]] = {}
        """Sums of each image's shares."""

    @property
    def cls_logits(self) -> Tensor | None:
        """(N,) float32 of the images `cls_images`; None where no cls head ran."""
        return None if self._cls_sum is None else self._cls_sum / self.num_copies

    def add(self, output: Any, view: View) -> None:
        """Take the output of another copy, whose images are in the same order."""
        self.num_copies += 1
        if output.cls_logits is not None:
            logits = output.cls_logits.float()
            self._cls_sum = logits if self._cls_sum is None else self._cls_sum + logits
            self.cls_images = output.cls_image_index.tolist()
        if output.mask_logits is not None:
            for image, logits in zip(output.mask_image_index.tolist(), output.mask_logits, strict=True):
                shown = view.back(logits.float().cpu().numpy())
                if image in self.maps:
                    self.maps[image].add(shown)
                else:
                    self.maps[image] = MeanMap(shown)
        if output.operation_logits is not None:
            for image, logits in zip(output.mask_image_index.tolist(), output.operation_logits, strict=True):
                shares = operation_shares(logits, self._names)
                before = self.operations.get(image, {})
                self.operations[image] = {name: before.get(name, 0.0) + share for name, share in shares.items()}


class Predictor:
    """Runs a bundle over queries in batches; safe to share between threads (one forward at a time).

    Args:
        bundle: a trained model with its processor.
        generation: thresholds, batch size, decoding and test-time augmentation.
        template, layout: default to what the model was trained with.
        device: `auto` takes a GPU if there is one.
        calibration: from the heads' logits (N,) to scores in [0, 1]; by default their sigmoid.

    Raises:
        ConfigError: test-time augmentation of a model without heads, or of heads that read the written answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        generation: GenerationConfig | None = None,
        *,
        template: Template | None = None,
        layout: str | None = None,
        device: str = "auto",
        calibration: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.bundle = bundle
        self.calibration = calibration
        self.generation = generation or GenerationConfig()
        self.template = template or trained_template(bundle)
        self.layout = layout or bundle.settings.get("layout", "tokens_first")
        # Folders written before there was a choice hold pixels of the resized image.
        self.coordinates: Coordinates = bundle.settings.get("polygon_coordinates", "absolute")
        self.views = VIEWS[self.generation.tta]
        if len(self.views) > 1:
            _refuse_copies(self.generation.tta, bundle, self.layout)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.model: Any = bundle.model.to(self.device).eval()
        self.collator = ForensicCollator(bundle.processor, bundle.tokens, padding_side="left")
        self._lock = threading.Lock()  # rope_deltas is state on the model

    @property
    def writes_text(self) -> bool:
        """Whether there is a language model; without one `text` stays empty."""
        return bool(self.bundle.base.config.has_language)

    @property
    def has_mask_head(self) -> bool:
        """Whether pixels are judged at all; without a mask head `mask_scores` is always None."""
        return hasattr(self.bundle.base, "mask_head")

    def predict(self, queries: Iterable[Query], *, with_text: bool = True) -> Iterator[list[Prediction]]:
        """One list of predictions (one per image) for each query, in order.

        Args:
            with_text: also generate the answer; otherwise `text` is "" (with `text_first` the answer is generated in
                any case, since the heads read it).

        Raises:
            DataFormatError: an image that cannot be read.
        """
        for batch in batched(queries, self.generation.batch_size):
            images = [[load_image(image, query.id) for image in query.images] for query in batch]
            yield from self.predict_batch(batch, images, with_text=with_text)

    def predict_batch(
        self, queries: Sequence[Query], images: Sequence[Sequence[Image.Image]], *, with_text: bool = True
    ) -> list[list[Prediction]]:
        """`predict` for queries whose images are open already, in one forward pass.

        Args:
            images: for each query its images, RGB and upright.

        Raises:
            DataFormatError: an image too narrow for the model.
        """
        with_text = with_text and self.writes_text
        with self._lock, torch.inference_mode():
            if self.bundle.base.reads_tower:
                heads, texts = self._from_tower(queries, images, with_text)
            elif self.layout == "tokens_first":
                heads, texts = self._tokens_first(queries, images, with_text)
            else:
                heads, texts = self._text_first(queries, images)
        return list(self._predictions(queries, images, heads, texts if with_text else [""] * len(queries)))

    def write(
        self,
        queries: Sequence[Query],
        images: Sequence[Sequence[Image.Image]],
        *,
        uses_adapter: bool = True,
        **hooks: Any,
    ) -> list[str]:
        """The language model's answers to questions, without forensic tokens: no head has a say in them.

        Args:
            images: as in `predict_batch`.
            uses_adapter: False takes an adapter (such as the vision LoRA) off while the answers are written.
            hooks: for `generate`, such as a streamer.

        Raises:
            ConfigError: the language model was left out. DataFormatError: an image too narrow for the model.
        """
        samples = [self._sample(query, pictures, "") for query, pictures in zip(queries, images, strict=True)]
        has_adapter = hasattr(self.model, "disable_adapter")
        as_asked = contextlib.nullcontext() if uses_adapter or not has_adapter else self.model.disable_adapter()
        with self._lock, torch.inference_mode(), as_asked:
            return self._generate(self._inputs(samples), **hooks)

    # ---- where the heads read ----

    def _from_tower(
        self, queries: Sequence[Query], images: Sequence[Sequence[Image.Image]], with_text: bool
    ) -> tuple[_HeadResult, list[str]]:
        """Heads on the vision tower: the images alone; a text is asked for apart from them."""
        pairs = list(zip(queries, images, strict=True))
        outputs = (
            self.model(**self._inputs([self._pictures(query, _copies(pictures, view)) for query, pictures in pairs]))
            for view in self.views
        )
        heads = self._read_heads(outputs, sum(len(pictures) for pictures in images), self.views)
        if not with_text:
            return heads, [""] * len(pairs)
        return heads, self._generate(self._inputs([self._sample(query, pictures, "") for query, pictures in pairs]))

    def _tokens_first(
        self, queries: Sequence[Query], images: Sequence[Sequence[Image.Image]], with_text: bool
    ) -> tuple[_HeadResult, list[str]]:
        """Prompt + forensic tokens: their states are in the prefill, which is also generation's first step.

        The text is about the picture itself; further copies of test-time augmentation take a prefill each.
        """
        pairs = list(zip(queries, images, strict=True))

        def inputs(view: View) -> dict[str, Any]:
            run = self.bundle.tokens.run
            return self._inputs([self._sample(query, _copies(of, view), run * len(of)) for query, of in pairs])

        with self._first_heads() as captured:
            if with_text:
                texts = self._generate(inputs(IDENTITY))
            else:
                self.model(**inputs(IDENTITY), logits_to_keep=1, use_cache=False)
                texts = [""] * len(pairs)

        def outputs() -> Iterator[Any]:
            if captured:
                yield captured.pop()
                for view in self.views[1:]:
                    yield self.model(**inputs(view), logits_to_keep=1, use_cache=False)

        return self._read_heads(outputs(), sum(len(pictures) for pictures in images), self.views), texts

    def _text_first(
        self, queries: Sequence[Query], images: Sequence[Sequence[Image.Image]]
    ) -> tuple[_HeadResult, list[str]]:
        """Generate the answer, then read the heads at the tokens the model itself wrote.

        Where it did not write them all, they are appended to its answer.
        """
        samples = [self._sample(query, pictures, "") for query, pictures in zip(queries, images, strict=True)]
        inputs = self._inputs(samples)
        written = self._generate_ids(inputs)
        tokenizer = self.bundle.tokenizer
        run = tokenizer.convert_tokens_to_ids(list(self.bundle.tokens.all))
        for sample, ids in zip(samples, written, strict=True):
            forensic = [token for token in ids if token in set(run)]
            num_cls = self.bundle.tokens.num_cls
            cls_ok = [t for t in forensic if t in run[:num_cls]] == run[:num_cls] * len(sample.images)
            mask_ok = [t for t in forensic if t in run[num_cls:]] == run[num_cls:] * len(sample.images)
            if not (cls_ok and mask_ok):
                ids = [token for token in ids if token not in set(run)] + run * len(sample.images)
            sample.input_ids = sample.input_ids + ids
            sample.labels = [-100] * len(sample.input_ids)
        with self._first_heads() as captured:
            self.model(**self._inputs(samples), logits_to_keep=1)
        texts = [self._decode(ids) for ids in written]
        return self._read_heads(captured, sum(len(pictures) for pictures in images)), texts

    # ---- pieces ----

    def _pictures(self, query: Query, images: Sequence[Image.Image]) -> Sample:
        """The images of a query alone, as the vision tower's heads read them."""
        sizes = [(image.height, image.width) for image in images]
        processed = processed_sizes(sizes, self.bundle.processor.image_processor, query.id)
        return Sample(query.id, list(images), [], [], mask_sizes_hw=sizes, processed_hw=processed)

    def _sample(self, query: Query, images: Sequence[Image.Image], run: str) -> Sample:
        sizes = [(image.height, image.width) for image in images]
        image_processor = self.bundle.processor.image_processor
        processed = processed_sizes(sizes, image_processor, query.id)
        pieces = [*segments(query.turns, self.template.system, for_generation=True), Segment(run, False)]
        counts = [num_image_tokens(size, image_processor) for size in processed]
        input_ids, labels = encode(pieces, self.bundle.tokenizer, counts)
        return Sample(query.id, list(images), input_ids, labels, mask_sizes_hw=sizes, processed_hw=processed)

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = self.collator(samples)
        kept = {key: batch[key] for key in MODEL_KEYS if key in batch and key != "logits_to_keep"}
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in kept.items()}

    def _generate_ids(self, inputs: dict[str, Any], **hooks: Any) -> list[list[int]]:
        """New token ids of each row, without end and padding tokens; `hooks` such as a streamer go to `generate`."""
        settings = self.generation
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.do_sample else {}
        tokenizer = self.bundle.tokenizer
        sequences = self.model.generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.do_sample,
            num_beams=1,
            **sampling,
            **hooks,
        )
        ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        rows = []
        for row in sequences[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            rows.append(row[:end])
        return rows

    def _generate(self, inputs: dict[str, Any], **hooks: Any) -> list[str]:
        return [self._decode(ids) for ids in self._generate_ids(inputs, **hooks)]

    def _decode(self, ids: list[int]) -> str:
        return str(self.bundle.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    @contextlib.contextmanager
    def _first_heads(self) -> Iterator[list[Any]]:
        """Collects the output of the first forward pass in which a head ran: generation does not hand it on."""
        captured: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            if not captured and (output.cls_logits is not None or output.mask_logits is not None):
                captured.append(output)

        handle = self.bundle.base.register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()

    def _read_heads(self, outputs: Iterable[Any], num_images: int, views: Sequence[View] = (IDENTITY,)) -> _HeadResult:
        """Scores and masks of the N images; a model with heads that did not run is a bug, never a score of 0.5.

        Args:
            outputs: one of the model for each of `views`, with the images in the same order; or none at all. Each is
                read and let go before the next is asked for. Logits are averaged over them, shares of operations too.
        """
        means = _HeadMeans(self.bundle.base.heads_config.operations)
        remaining = iter(outputs)
        for view in views:
            if (output := next(remaining, None)) is None:
                break
            means.add(output, view)
            del output
        if not means.num_copies and self.bundle.base.has_heads and num_images:
            raise RuntimeError("the model has heads but none ran: the forensic tokens or the pixels did not reach it")
        result = _HeadResult.empty(num_images)
        if (logits := means.cls_logits) is not None:
            scores = raw = logits.sigmoid().tolist()
            if self.calibration is not None:
                scores = self.calibration(logits.cpu().numpy()).tolist()
            for image, score, own in zip(means.cls_images, scores, raw, strict=True):
                result.scores[image] = score
                result.raw[image] = own if self.calibration is not None else None
        for image, logit_map in means.maps.items():
            result.masks[image] = torch.from_numpy(logit_map.mean).sigmoid().numpy()
        for image, shares in means.operations.items():
            result.operations[image] = {name: share / means.num_copies for name, share in shares.items()}
        return result

    def _predictions(
        self,
        queries: Sequence[Query],
        images: Sequence[Sequence[Image.Image]],
        heads: _HeadResult,
        texts: Sequence[str],
    ) -> Iterator[list[Prediction]]:
        first = 0
        for query, pictures, text in zip(queries, images, texts, strict=True):
            answers = read_answers(text, self.template, len(pictures), self._frames(pictures)) if text else None
            results = []
            for k, picture in enumerate(pictures):
                score, mask = heads.scores[first + k], heads.masks[first + k]
                answer = answers[k] if answers is not None else None
                verdict_from: VerdictSource = "head"
                if score is None:  # no cls head: the written verdict is all there is
                    verdict_from = "nothing" if answer is None else "text"
                    score = 0.5 if answer is None else float(answer.label)
                results.append(
                    Prediction(
                        id=query.id if len(pictures) == 1 else f"{query.id}#{k + 1}",
                        image_path=query.images[k].path or "",
                        label=int(verdict_from != "nothing" and score >= self.generation.score_threshold),
                        score=score,
                        mask_scores=mask,
                        polygons=self._polygons(mask),
                        text=text,
                        parse_ok=answer is not None,
                        size_hw=(picture.height, picture.width),
                        text_label=None if answer is None else answer.label,
                        text_polygons=None if answer is None else answer.polygons,
                        raw_score=heads.raw[first + k],
                        operations=heads.operations[first + k],
                        verdict_from=verdict_from,
                    )
                )
            first += len(pictures)
            yield results

    def _frames(self, pictures: Sequence[Image.Image]) -> list[PolygonFrame]:
        """What the coordinates of each image's answer are counted in."""
        sizes = [(picture.height, picture.width) for picture in pictures]
        image_processor = self.bundle.processor.image_processor
        return [PolygonFrame(self.coordinates, size, processed_size(size, image_processor)) for size in sizes]

    def _polygons(self, mask: np.ndarray | None) -> tuple[Polygon, ...]:
        if mask is None:
            return ()
        return polygons_from_mask(mask >= self.generation.mask_threshold)


def _refuse_copies(asked: str, bundle: Bundle, layout: str) -> None:
    """Test-time augmentation of a model that has no use for it.

    Raises:
        ConfigError: it has no heads, or heads that read the written answer.
    """
    if not bundle.base.has_heads:
        raise ConfigError(f"tta is {asked}, but this model has no heads whose scores could be averaged; give tta none")
    if layout == "text_first" and not bundle.base.reads_tower:
        raise ConfigError(
            f"tta is {asked}, but this model's heads read the answer it wrote (text_first), which says where the edit "
            "is in the picture as it stands; give tta none"
        )


def _copies(pictures: Sequence[Image.Image], view: View) -> list[Image.Image]:
    return [view.of(picture) for picture in pictures]


def operation_shares(logits: Tensor, names: Sequence[str]) -> dict[str, float]:
    """How an image was tampered, if it was, from what the operation head says of every place.

    Args:
        logits: (1 + K, h, w), authentic first. names: of the K operations.

    Returns:
        Per name the sum over places of p(name) (1 - p(authentic)), divided by the sum of all names: places count as far
        as they look tampered at all.
    """
    log_p = logits.double().log_softmax(dim=0).flatten(1)  # (1 + K, h w); in logarithms, nothing is too small
    sums = (log_p[1:] + log_p[1:].logsumexp(dim=0)).logsumexp(dim=1)  # (K,)
    return dict(zip(names, sums.softmax(dim=0).tolist(), strict=True))


def trained_template(bundle: Bundle) -> Template:
    """The template a model was trained with; `zh` where the folder does not say."""
    stored = bundle.settings.get("template")
    if stored is None:
        return load_template("zh")
    return Template.from_dict(stored)
