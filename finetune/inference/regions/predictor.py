"""What a model says of candidate regions: a probability for each, read from its verdict's words, and its answer.

A record's candidates are asked about in one question, or in several. Only the question is shown, never an answer or a
label. First the verdicts' probabilities are read (`verdicts`); once a threshold has decided them, the rest of the
answer is written by the model and read back. A record that cannot be used comes back with its error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

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
from finetune.inference.regions.verdicts import CachedAnswers, verdict_scores
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
    """A predictor that is asked about candidate regions; takes the arguments of `Predictor`."""

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

    def read_verdicts(self, samples: Sequence[Sample], ids: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """Probability of `abnormal` for each region, id -> [0, 1], from one prefill of all questions.

        Args:
            samples: `region_sample`s without verdicts. ids: of each one's regions, in order.
        """
        with self._lock, torch.inference_mode():
            answers = CachedAnswers(self.model, self.bundle.base, self._inputs(samples))
            return verdict_scores(answers, self.bundle.tokenizer, ids)

    def write_answers(self, samples: Sequence[Sample], verdicts: Sequence[Mapping[str, bool]]) -> list[WrittenAnswer]:
        """The answers whose verdicts are given.

        Args:
            samples: `region_sample`s with these verdicts. verdicts: of each one id -> abnormal.
        """
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

    def read(asked: Sequence[_Asked], samples: Sequence[Sample]) -> list[dict[str, float]]:
        return predictor.read_verdicts(samples, [region_ids(each.part) for each in asked])

    found = _ask(predictor, records, max_regions, lambda asked: None, read)
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

    def verdicts(asked: _Asked) -> dict[str, bool]:
        return {name: usable[asked.number].scores[name] >= threshold for name in region_ids(asked.part)}

    def write(asked: Sequence[_Asked], samples: Sequence[Sample]) -> list[WrittenAnswer]:
        return predictor.write_answers(samples, [verdicts(each) for each in asked])

    written = _ask(predictor, [each.record for each in usable], max_regions, verdicts, write)
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
        decided = {name: score >= threshold for name, score in each.scores.items()}
        yield replace(each, verdicts=decided, findings=findings, answers=tuple(answers))


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


class _Asked(NamedTuple):
    """One question: the number of its record, the candidates it is about, and why it cannot be asked."""

    number: int
    part: Record
    error: DataFormatError | None = None


def _ask(
    predictor: RegionPredictor,
    records: Sequence[Record],
    max_regions: int | None,
    verdicts: Callable[[_Asked], Mapping[str, bool] | None],
    run: Callable[[Sequence[_Asked], Sequence[Sample]], list[T]],
) -> Iterator[tuple[list[T], DataFormatError | None]]:
    """For each record what `run` gave for the questions about it, or why it cannot be used; in order, in batches.

    Args:
        verdicts: that stand in a question's sample. run: of the questions of a batch and their samples.
    """

    def opened(asked: _Asked) -> Image.Image:
        if asked.error is not None:
            raise asked.error
        return load_image(asked.part.images[0], asked.part.id, asked.part.source)

    def sample(asked: _Asked, found: Image.Image | DataFormatError) -> Sample | DataFormatError:
        if isinstance(found, DataFormatError):
            return found
        try:
            return predictor.region_sample(asked.part, found, verdicts(asked))
        except DataFormatError as error:
            return error

    def results() -> Iterator[tuple[int, T | DataFormatError]]:
        questions = prefetch(_questions(predictor, records, max_regions), opened, workers=2)
        for batch in batched(questions, predictor.generation.batch_size):
            made = [(asked, sample(asked, found)) for asked, found in batch]
            usable = [(asked, found) for asked, found in made if isinstance(found, Sample)]
            answers = iter(run([asked for asked, _ in usable], [found for _, found in usable]) if usable else [])
            for asked, found in made:
                yield asked.number, next(answers) if isinstance(found, Sample) else found

    for _, group in itertools.groupby(results(), key=lambda each: each[0]):
        found = [each for _, each in group]
        error = next((each for each in found if isinstance(each, DataFormatError)), None)
        yield [each for each in found if not isinstance(each, DataFormatError)], error


def _questions(predictor: RegionPredictor, records: Sequence[Record], max_regions: int | None) -> Iterator[_Asked]:
    """Every question about every record, without its answer."""
    for number, record in enumerate(records):
        try:
            region_ids(record)
            whole = replace(record, turns=predictor.question(record))
            yield from (_Asked(number, part) for part in regions_in_chunks(whole, max_regions))
        except DataFormatError as error:
            yield _Asked(number, record, error)
