"""What a model says of candidate regions: a probability for each, read from its verdict's words, and its answer.

A record's candidates are asked about in one question, or in several. Only the question is shown, never an answer or a
label. First the verdicts' probabilities are read (`verdicts.py`); once a threshold has decided them, the rest of the
answer is written by the model and read back. A record that cannot be used comes back with its error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from PIL import Image

from finetune.data.chat import question_turns, segments
from finetune.data.dataset import Sample, num_image_tokens, processed_sizes
from finetune.data.images import load_image
from finetune.data.regions.limit import regions_in_chunks
from finetune.data.regions.places import region_places
from finetune.data.regions.text import REGIONS, expand_regions, record_regions
from finetune.data.regions.wording import (
    BUILT_IN,
    ParsedRegions,
    RegionFinding,
    answer_start,
    load_region_template,
    parse_answer,
)
from finetune.errors import DataFormatError
from finetune.inference.evidence.prefetch import prefetch
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, batched
from finetune.inference.verdicts import CachedAnswers, verdict_scores
from finetune.schema import Record, Turn
from finetune.special_tokens import IGNORE_INDEX

T = TypeVar("T")


@dataclass(frozen=True)
class WrittenAnswer:
    """One answer as it was written, from its first brace.

    Args:
        text: the verdicts as decided, then what the model wrote.
        parsed: read back; exact where it is the JSON asked for, with a finding for just the abnormal regions.
        is_finished: the model ended it before the limit of new tokens.
    """

    text: str
    parsed: ParsedRegions
    is_finished: bool


@dataclass(frozen=True)
class ReadRegions:
    """What the model says of the candidates of one record.

    Args:
        record: as it was given.
        scores: id -> probability of `abnormal`, for each candidate; {} where there is an `error`.
        verdicts: id -> whether it is called abnormal: its score against the threshold; {} until one is given.
        findings: id -> type, confidence and reason as the model wrote them, of the regions it wrote about.
        answers: one for each question about the record.
        error: why the record could not be used.
    """

    record: Record
    scores: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, bool] = field(default_factory=dict)
    findings: dict[str, RegionFinding] = field(default_factory=dict)
    answers: tuple[WrittenAnswer, ...] = ()
    error: DataFormatError | None = None


class RegionPredictor(Predictor):
    """A predictor that is asked about candidate regions; takes the arguments of `Predictor`.

    The records given to its methods have as many candidates as are asked about at once.
    """

    def region_sample(self, record: Record, picture: Image.Image, verdicts: Mapping[str, bool] | None = None) -> Sample:
        """The question about a record's candidates, up to where the answer begins, or behind its verdicts.

        Args:
            picture: its image, RGB and upright.
            verdicts: id -> abnormal, for all candidates in their order: the answer then begins with them.

        Raises:
            DataFormatError: damaged candidates, or an image too narrow for the model.
        """
        size = (picture.height, picture.width)
        processed = processed_sizes([size], self.bundle.processor.image_processor, record.id, record.source)
        turns = expand_regions(record, self.question(record), [size], processed)
        sample = self._sample(Query(record.id, record.images, turns), [picture], "")
        if self.bundle.base.config.region_features:
            image_processor = self.bundle.processor.image_processor
            sample.region_boxes, sample.region_tokens = region_places(
                record,
                segments(turns, self.template.system, for_generation=True),
                self.bundle.tokenizer,
                [num_image_tokens(processed[0], image_processor)],
                [size],
                processed,
            )
        if verdicts is not None:
            start = answer_start(list(verdicts), list(verdicts.values()))
            sample.input_ids = sample.input_ids + self.bundle.tokenizer.encode(start, add_special_tokens=False)
            sample.labels = [IGNORE_INDEX] * len(sample.input_ids)
        return sample

    def read_verdicts(self, records: Sequence[Record], pictures: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Probability of `abnormal` for each candidate of each record, id -> [0, 1], from one prefill of all."""
        samples = [self.region_sample(*pair) for pair in zip(records, pictures, strict=True)]
        ids = [region_ids(record) for record in records]
        with self._lock, torch.inference_mode():
            answers = CachedAnswers(self.model, self.bundle.base, self._inputs(samples))
            return verdict_scores(answers, self.bundle.tokenizer, ids)

    def write_answers(
        self, records: Sequence[Record], pictures: Sequence[Image.Image], verdicts: Sequence[Mapping[str, bool]]
    ) -> list[WrittenAnswer]:
        """The answers to the questions about the records, their verdicts given: id -> abnormal, for each candidate."""
        samples = [self.region_sample(*each) for each in zip(records, pictures, verdicts, strict=True)]
        with self._lock, torch.inference_mode():
            written = self._generate_ids(self._inputs(samples))
        found = []
        for words, ids in zip(verdicts, written, strict=True):
            start = answer_start(list(words), list(words.values()))
            # decoded as one: a character may be spread over tokens
            text = self._decode(self.bundle.tokenizer.encode(start, add_special_tokens=False) + ids)
            is_finished = len(ids) < self.generation.max_new_tokens
            found.append(WrittenAnswer(text, parse_answer(text, list(words)), is_finished))
        return found

    def question(self, record: Record) -> tuple[Turn, ...]:
        """The turns before the answer: the record's own, or the built-in question of its language."""
        if record.turns:
            return question_turns(record, self.template)
        language = record.provenance.get("language")
        return (Turn("user", load_region_template(language if language in BUILT_IN else BUILT_IN[0]).question()),)


def score_regions(
    predictor: RegionPredictor, records: Sequence[Record], max_regions: int | None = None
) -> Iterator[ReadRegions]:
    """The probability of each candidate of each record, in order.

    Args:
        max_regions: candidates asked about at once; None asks about all of a record together.
    """
    found = _ask(records, predictor, max_regions, lambda _, parts, pictures: predictor.read_verdicts(parts, pictures))
    for record, (parts, error) in zip(records, found, strict=True):
        scores = {name: score for part in parts for name, score in part.items()}
        yield ReadRegions(record, {} if error is not None else scores, error=error)


def explain_regions(
    predictor: RegionPredictor, scored: Sequence[ReadRegions], threshold: float, max_regions: int | None = None
) -> Iterator[ReadRegions]:
    """The verdicts of scored records at a threshold, and the answers that the model writes after them; in order.

    Args:
        max_regions: as for `score_regions`.
    """
    usable = [each for each in scored if each.error is None]

    def write(numbers: Sequence[int], parts: Sequence[Record], pictures: Sequence[Image.Image]) -> list[WrittenAnswer]:
        words = [
            {name: usable[number].scores[name] >= threshold for name in region_ids(part)}
            for number, part in zip(numbers, parts, strict=True)
        ]
        return predictor.write_answers(parts, pictures, words)

    written = _ask([each.record for each in usable], predictor, max_regions, write)
    for each in scored:
        if each.error is not None:
            yield each
            continue
        answers, error = next(written)
        if error is not None:
            yield ReadRegions(each.record, error=error)
            continue
        findings: dict[str, RegionFinding] = {}
        for answer in answers:
            for finding in answer.parsed.findings:
                findings.setdefault(finding.id, finding)
        verdicts = {name: score >= threshold for name, score in each.scores.items()}
        yield replace(each, verdicts=verdicts, findings=findings, answers=tuple(answers))


def region_ids(record: Record) -> list[str]:
    """Ids of a record's candidates.

    Raises:
        DataFormatError: it has none, or they are damaged.
    """
    regions = record_regions(record)
    if regions is None:
        raise DataFormatError(
            "no candidate regions",
            record=record.id,
            source=record.source,
            field=f"provenance.{REGIONS}",
            fix="build the file with forensics regions build",
        )
    return [name for name, _ in regions]


def _ask(
    records: Sequence[Record],
    predictor: RegionPredictor,
    max_regions: int | None,
    ask: Callable[[Sequence[int], Sequence[Record], Sequence[Image.Image]], list[T]],
) -> Iterator[tuple[list[T], DataFormatError | None]]:
    """For each record what `ask` gave for the questions about it, or why it cannot be used; in order, in batches.

    Args:
        ask: of the records' numbers, their parts and images.
    """

    def parts() -> Iterator[tuple[int, Record, DataFormatError | None]]:
        for number, record in enumerate(records):
            try:
                region_ids(record)
                asked = replace(record, turns=predictor.question(record))
                yield from ((number, part, None) for part in regions_in_chunks(asked, max_regions))
            except DataFormatError as error:
                yield number, record, error

    def opened(item: tuple[int, Record, DataFormatError | None]) -> Image.Image:
        _, part, error = item
        if error is not None:
            raise error
        picture = load_image(part.images[0], part.id, part.source)
        processor = predictor.bundle.processor.image_processor
        processed_sizes([(picture.height, picture.width)], processor, part.id, part.source)
        return picture

    def results() -> Iterator[tuple[int, T | DataFormatError]]:
        for batch in batched(prefetch(parts(), opened, workers=2), predictor.generation.batch_size):
            usable = [(*item[:2], found) for item, found in batch if not isinstance(found, DataFormatError)]
            answers = iter(ask(*zip(*usable, strict=True)) if usable else [])
            for item, found in batch:
                yield item[0], found if isinstance(found, DataFormatError) else next(answers)

    for _, group in itertools.groupby(results(), key=lambda each: each[0]):
        found = [each for _, each in group]
        error = next((each for each in found if isinstance(each, DataFormatError)), None)
        yield [each for each in found if not isinstance(each, DataFormatError)], error
