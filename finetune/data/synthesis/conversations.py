"""Conversations about generated images, for instruction tuning: comparisons, several turns, conclusions, other wording.

Every sentence comes from the provenance of the images. No forensic token is written here: finetune.data.chat puts the
whole run before the first answer that has seen every image, so that nothing the heads read depends on an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.config import DataConfig
from finetune.data.answer_polygons import Coordinates, PolygonFrame
from finetune.data.chat import polygon_text, render_answer
from finetune.data.synthesis.answers import LANGUAGES, evidence_text, finding_text, origin_text, place_words, size_words
from finetune.data.synthesis.conversation_phrases import PHRASES, STEPS, TYPES
from finetune.data.synthesis.photos import SPLITS
from finetune.data.template import load_template
from finetune.schema import ImageInput, ImageTarget, Polygon, Record
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

if TYPE_CHECKING:
    from finetune.data.synthesis.config import SynthConfig

COORDINATES = ("absolute", "relative", "words")
_CELL = 28  # pixels of a merged patch: sides that are multiples of it pass Qwen2.5-VL's resizing unchanged

JsonRecord = dict[str, Any]
Message = dict[str, str]


class Wording:
    """One record's language, its source of chance, and how its coordinates are written."""

    def __init__(self, language: str, rng: np.random.Generator, coordinates: str) -> None:
        self.language, self.rng, self.coordinates = language, rng, coordinates

    def say(self, key: str, **values: str) -> str:
        """One of the phrasings of `key`, filled in; `{image}` is always known."""
        choices = PHRASES[self.language][key]
        return choices[int(self.rng.integers(len(choices)))].format(image=IMAGE_PLACEHOLDER, **values)

    def finding(self, provenance: dict[str, Any]) -> str:
        """What was done and where."""
        return finding_text(provenance, self.language, self.rng)

    def history(self, provenance: dict[str, Any]) -> str:
        """The steps of post-processing with their parameters, "" where there is none."""
        words = [STEPS[self.language][step["name"]].format(**step) for step in provenance["degradations"]]
        return ("、" if self.language == "zh" else ", ").join(words)

    def polygons(self, image: JsonRecord) -> tuple[Polygon, ...] | None:
        """The image's polygons in the frame of the answer; None where no coordinates may be written."""
        height, width = image["provenance"]["size_hw"]
        if self.coordinates == "words" or (self.coordinates == "absolute" and not is_kept_by_resizing(height, width)):
            return None
        polygons = [tuple((float(x), float(y)) for x, y in polygon) for polygon in image["polygons"][0]]
        kind: Coordinates = "absolute" if self.coordinates == "absolute" else "relative"
        return PolygonFrame(kind, (height, width), (height, width)).write(polygons)


def is_kept_by_resizing(height: int, width: int) -> bool:
    """Whether Qwen2.5-VL sees an image at its own size under the default `data.min_pixels` and `data.max_pixels`."""
    bounds = DataConfig()
    return height % _CELL == width % _CELL == 0 and bounds.min_pixels <= height * width <= bounds.max_pixels


def multi_turn(image: JsonRecord, wording: Wording) -> list[Message]:
    """Verdict, where, why, how sure; in half of them also how the whole picture was processed."""
    provenance = image["provenance"]
    operation, history = provenance["operation"], wording.history(image["provenance"])
    label = "real" if operation is None else "fake"
    turns = [wording.say("verdict.ask"), _verdict("verdict", operation, wording)]
    turns += [wording.say("where.ask"), _where(image, wording)]
    finding = wording.finding(provenance)
    if operation is not None and (origin := origin_text(provenance, wording.language)):
        finding += ("，" if wording.language == "zh" else ", ") + origin
    turns += [wording.say("why.ask"), wording.say(f"why.{label}", finding=finding)]
    certainty = provenance.get("difficulty") or ("real_processed" if history else "real")
    turns += [wording.say("sure.ask"), wording.say(f"sure.{certainty}", history=history)]
    if wording.rng.random() < 0.5:
        answer = wording.say("history.some" if history else "history.none", history=history)
        turns += [wording.say("history.ask"), answer]
    return _messages(turns)


def conclusion_only(image: JsonRecord, wording: Wording) -> list[Message]:
    """One question, one line with the verdict."""
    answer = _verdict("conclusion", image["provenance"]["operation"], wording)
    return _messages([wording.say("conclusion.ask"), answer])


def paraphrase(image: JsonRecord, wording: Wording) -> list[Message]:
    """The usual JSON answer to a question that the templates do not hold.

    The answer is the template's own, so that it is read by the same parser; without coordinates `mask` is left out.
    """
    template = load_template(wording.language)
    evidence = evidence_text(image["provenance"], wording.language, wording.rng, "full")
    polygons = wording.polygons(image)
    target = ImageTarget(label=image["labels"][0], polygons=polygons or (), evidence=evidence)
    record = Record(image["id"], (ImageInput(path=image["images"][0]),), (target,))
    tokens = SpecialTokens()
    answer = tokens.strip(render_answer(record, template, tokens, "tokens_first"))
    if polygons is None:
        answer = answer.replace(f' "mask": {polygon_text(())},', "")
    return _messages([wording.say("paraphrase.ask"), answer])


def comparison(images: Sequence[JsonRecord], wording: Wording) -> list[Message]:
    """Two images: which is tampered and what differs, or that both are real or both tampered."""
    labels = ["real" if image["provenance"]["operation"] is None else "fake" for image in images]
    first, second = (wording.finding(image["provenance"]) for image in images)
    question = wording.say("comparison.ask", images=IMAGE_PLACEHOLDER * 2)
    answer = wording.say(f"comparison.{labels[0]}_{labels[1]}", first=first, second=second)
    if _are_twins(images):
        answer = wording.say("comparison.same") + answer
    return _messages([question, answer])


def multi_image(images: Sequence[JsonRecord], wording: Wording) -> None:
    """Two to four images; question and joint JSON answer are rendered by the template of the training run."""


SINGLE_IMAGE: dict[str, Callable[[JsonRecord, Wording], list[Message]]] = {
    "multi_turn": multi_turn,
    "conclusion_only": conclusion_only,
    "paraphrase": paraphrase,
}
SEVERAL_IMAGES: dict[str, Callable[[Sequence[JsonRecord], Wording], list[Message] | None]] = {
    "comparison": comparison,
    "multi_image": multi_image,
}
RECORD_KINDS = ("single", *SINGLE_IMAGE, *SEVERAL_IMAGES)
"""Every kind of record; `single` is one image whose answer is rendered by the template of the training run."""


def conversation_records(config: SynthConfig, split: str, images: Sequence[JsonRecord]) -> Iterator[JsonRecord]:
    """Records of every kind but `single`, `config.record_kinds[kind]` of them per image.

    Args:
        images: the split's finished single-image records, all of them.

    Yields:
        native records; `provenance` holds `kind`, `from` (ids of the images), `language`, and what is known of the
        image or, as `images`, of each of them. Records of several images use one photograph's images unless
        `config.mix_photos`; then `group` joins the names of all of them with "+". Fewer than asked for where a
        photograph has only one image.
    """
    album = _Album(images, config.mix_photos)
    for number, kind in enumerate(RECORD_KINDS):
        count = round(config.record_kinds.get(kind, 0.0) * len(images)) if kind != "single" else 0
        seeds = [config.seed, SPLITS.index(split), number]
        order = np.random.default_rng([*seeds, 2]).permutation(len(images))
        for index in range(count):
            rng = np.random.default_rng([*seeds, 3, index])
            language = config.language if config.language != "both" else LANGUAGES[int(rng.integers(2))]
            wording = Wording(language, rng, config.coordinates)
            first = images[order[index % len(images)]]
            if kind in SINGLE_IMAGE:
                chosen = [first]
                messages: list[Message] | None = SINGLE_IMAGE[kind](first, wording)
            else:
                chosen = album.pair(first, rng) if kind == "comparison" else album.several(first, rng)
                if len(chosen) < 2:
                    continue  # counted by the caller, who says so
                messages = SEVERAL_IMAGES[kind](chosen, wording)
            yield _record(f"{split}-{kind}-{index:06d}", kind, chosen, messages, wording)


def _record(
    record_id: str, kind: str, images: Sequence[JsonRecord], messages: list[Message] | None, wording: Wording
) -> JsonRecord:
    known = [{key: value for key, value in image["provenance"].items() if key != "pair"} for image in images]
    provenance: dict[str, Any] = known[0] if len(images) == 1 else {"images": known}
    provenance |= {"kind": kind, "from": [image["id"] for image in images], "language": wording.language}
    evidence = [evidence_text(image["provenance"], wording.language, wording.rng) for image in images]
    return {
        "id": record_id,
        "group": "+".join(sorted({image["group"] for image in images})),
        "images": [image["images"][0] for image in images],
        "labels": [image["labels"][0] for image in images],
        "masks": [image["masks"][0] for image in images],
        "polygons": [image["polygons"][0] for image in images],
        "evidence": evidence,
        **({} if messages is None else {"messages": messages}),
        "provenance": provenance,
    }


class _Album:
    """Which images may stand together in one record."""

    def __init__(self, images: Sequence[JsonRecord], mix_photos: bool) -> None:
        self._mix_photos = mix_photos
        self._groups: dict[str, list[JsonRecord]] = {}
        self._classes: dict[tuple[str, int], list[JsonRecord]] = {}
        self._pairs: dict[str, list[JsonRecord]] = {}
        for image in images:
            self._groups.setdefault(self._group(image), []).append(image)
            self._classes.setdefault((self._group(image), image["labels"][0]), []).append(image)
            if "pair" in image["provenance"]:
                self._pairs.setdefault(image["provenance"]["pair"], []).append(image)

    def _group(self, image: JsonRecord) -> str:
        return "" if self._mix_photos else image["group"]

    def pair(self, first: JsonRecord, rng: np.random.Generator) -> list[JsonRecord]:
        """`first` and another, in random order: of the other class in 7 of 10, then half the time its own twin."""
        group, label = self._group(first), first["labels"][0]
        wants_other_class = rng.random() < 0.7
        candidates = self._classes.get((group, 1 - label if wants_other_class else label), [])
        twins = self._pairs.get(first["provenance"].get("pair", ""), [])
        if wants_other_class and len(twins) == 2 and rng.random() < 0.5:
            candidates = twins
        chosen = [first, *(_draw(candidates, first, 1, rng) or _draw(self._groups[group], first, 1, rng))]
        return chosen if rng.random() < 0.5 else chosen[::-1]

    def several(self, first: JsonRecord, rng: np.random.Generator) -> list[JsonRecord]:
        """`first` and one to three others in random order."""
        chosen = [first, *_draw(self._groups[self._group(first)], first, int(rng.integers(1, 4)), rng)]
        return [chosen[i] for i in rng.permutation(len(chosen))]


def _draw(images: Sequence[JsonRecord], first: JsonRecord, count: int, rng: np.random.Generator) -> list[JsonRecord]:
    """Up to `count` different images other than `first`."""
    holds_first = any(image is first for image in images)
    available = len(images) - holds_first
    if not available:
        return []
    chosen = rng.choice(available, size=min(count, available), replace=False)
    return [images[-1] if images[i] is first else images[i] for i in chosen]  # the last one stands in for `first`


def _are_twins(images: Sequence[JsonRecord]) -> bool:
    pairs = {image["provenance"].get("pair") for image in images}
    return len(pairs) == 1 and None not in pairs


def _verdict(key: str, operation: dict[str, Any] | None, wording: Wording) -> str:
    if operation is None:
        return wording.say(f"{key}.real")
    return wording.say(f"{key}.fake", type=TYPES[wording.language][operation["name"]])


def _where(image: JsonRecord, wording: Wording) -> str:
    """The region in words, and as polygons where coordinates may be written."""
    if image["provenance"]["operation"] is None:
        return wording.say("where.real")
    region, language = image["provenance"]["region"], wording.language
    answer = wording.say("where.fake", place=place_words(region["place"], language), size=size_words(region, language))
    polygons = wording.polygons(image)
    if polygons is None:
        return answer
    return answer + (" " if language == "en" else "") + wording.say("where.polygons", polygons=polygon_text(polygons))


def _messages(texts: Sequence[str]) -> list[Message]:
    """Texts by turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
