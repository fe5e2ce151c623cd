"""Probabilities of verdicts: the cached, batched reading equals whole forward passes, image tokens and all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import GenerationConfig, HeadsConfig, ModelConfig
from finetune.data.corpus import tokenizer_corpus
from finetune.data.images import load_image
from finetune.data.regions.wording import RegionFinding, answer_start, load_region_template, write_answer
from finetune.errors import DataFormatError
from finetune.inference.regions.predictor import ReadRegions, RegionPredictor, explain_regions, score_regions
from finetune.inference.regions.verdicts import Fork, fork
from finetune.models.loading import load_bundle
from finetune.models.tiny import TinyShape, build_tiny
from finetune.schema import ImageInput, ImageTarget, Record, Turn

SIZES_HW = [(112, 168), (150, 97), (84, 84), (140, 224)]
COUNTS = [2, 4, 1, 3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint for which both words are tokens of their own."""
    shape = TinyShape(
        hidden_size=64, num_layers=2, intermediate_size=128, vision_hidden_size=32, vision_depth=3,
        vision_intermediate_size=64, fullatt_block_indexes=(2,), vocab_size=600,
    )  # fmt: skip
    words = [write_answer({"R1": True, "R2": False}, [])] * 200
    return build_tiny(tmp_path_factory.mktemp("model") / "tiny", [*tokenizer_corpus(), *words], shape)


def load(folder: Path, *, region_features: bool) -> Any:
    """Text only, with weights large enough that each word and each image counts."""
    config = ModelConfig(path=str(folder), dtype="float32", region_features=region_features)
    loaded = load_bundle(config, heads=HeadsConfig(enabled=False))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "region" in name:  # starts at zero, as if it were not there
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.mul_(10 if "embed_tokens" in name else 4)
    return loaded


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Any:
    return load(tiny, region_features=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Images of odd sizes with one to four candidates; the answers are there and wrong, nobody may read them."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number, ((height, width), count) in enumerate(zip(SIZES_HW, COUNTS, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        regions = [
            {"id": f"R{k + 1}", "box_xyxy": [5 * k, 3 * k, 5 * k + 40, 3 * k + 30], "type": "crack" if k else None}
            for k in range(count)
        ]
        template = load_region_template("en")
        turns = (
            Turn("user", template.question(str(number))),
            Turn("assistant", template.answer({region["id"]: "spall" for region in regions})),
        )
        provenance = {"regions": regions, "positive_region_ids": [r["id"] for r in regions if r["type"]]}
        image = ImageInput(path=str(folder / f"{number}.png"))
        found.append(Record(f"r{number}", (image,), (ImageTarget(),), turns, provenance=provenance))
    return found


def predictor(bundle: Any, batch_size: int = 8, **more: Any) -> RegionPredictor:
    return RegionPredictor(bundle, GenerationConfig(batch_size=batch_size, max_new_tokens=6, **more), device="cpu")


def names(record: Record) -> list[str]:
    return [region["id"] for region in record.provenance["regions"]]


def log_probability(asks: RegionPredictor, record: Record, before: list[int], word: list[int]) -> float:
    """Of `word` behind the question and `before`: a whole forward pass without a cache, positions the model's own."""
    sample = asks.region_sample(record, load_image(record.images[0]))
    sample.input_ids = sample.input_ids + before + word
    sample.labels = [-100] * len(sample.input_ids)
    with torch.inference_mode():
        asks.model.model.rope_deltas = None
        logits = asks.model(**asks._inputs([sample])).logits[0].double().log_softmax(dim=-1)  # (T, V)
    first = len(sample.input_ids) - len(word)
    return float(sum(logits[first - 1 + k, token] for k, token in enumerate(word)))


def by_hand(asks: RegionPredictor, record: Record) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name in names(record):
        place = fork(asks.bundle.tokenizer, names(record), [score >= 0.5 for score in scores.values()])
        odds = log_probability(asks, record, place.shared, place.abnormal) - log_probability(
            asks, record, place.shared, place.normal
        )
        scores[name] = 1 / (1 + float(np.exp(-odds)))
    return scores


@pytest.fixture(scope="module")
def expected(bundle: Any, records: list[Record]) -> list[dict[str, float]]:
    return [by_hand(predictor(bundle), record) for record in records]


def test_what_is_expected_depends_on_place_image_and_earlier_words(expected: list[dict[str, float]]) -> None:
    """Else the tests below would pass for a reading that is blind to them."""
    values = [round(score, 3) for scores in expected for score in scores.values()]
    assert len(set(values)) == len(values)
    assert max(values) - min(values) > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_cached_reading_equals_whole_forward_passes(
    bundle: Any, records: list[Record], expected: list[dict[str, float]], batch_size: int
) -> None:
    """Rows of a batch have prompts of other lengths, other numbers of regions, and other words before them."""
    found = list(score_regions(predictor(bundle, batch_size), records))
    assert [each.error for each in found] == [None] * 4
    for each, scores in zip(found, expected, strict=True):
        assert each.scores == pytest.approx(scores, abs=1e-4)


def test_a_model_that_looks_at_the_regions_reads_the_same_in_batches(
    tiny: Path, records: list[Record], expected: list[dict[str, float]]
) -> None:
    """What the tower saw inside each box is in the prefill, and nowhere else."""
    looks = load(tiny, region_features=True)
    own = [by_hand(predictor(looks), record) for record in records]
    for each, scores, without in zip(score_regions(predictor(looks), records), own, expected, strict=True):
        assert each.scores == pytest.approx(scores, abs=1e-4)
        assert each.scores != pytest.approx(without, abs=1e-3)


def test_cache_equals_whole_passes_where_words_have_many_tokens(
    bundle: Any, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both words in pieces, as a small vocabulary may have them, and written letter by letter."""
    import finetune.inference.regions.verdicts as module

    asks = predictor(bundle)
    letters = {word: [asks.bundle.tokenizer.encode(c)[0] for c in word] for word in ("abnormal", "normal")}

    def spelled(tokenizer: Any, ids: list[str], decided: list[bool]) -> Fork:
        plain = fork(tokenizer, ids, decided)
        return Fork(plain.shared, letters["abnormal"], letters["normal"])

    expected = []
    for record in records[:2]:
        place = spelled(asks.bundle.tokenizer, names(record), [])
        expected.append(
            log_probability(asks, record, place.shared, place.abnormal)
            - log_probability(asks, record, place.shared, place.normal)
        )
    monkeypatch.setattr(module, "fork", spelled)
    for each, odds in zip(score_regions(asks, records[:2]), expected, strict=True):
        first = each.scores["R1"]
        assert np.log(first) - np.log1p(-first) == pytest.approx(odds, abs=1e-3)


def test_the_image_is_seen(bundle: Any, records: list[Record], tmp_path: Path) -> None:
    """Another picture of the same size, the same words: other probabilities."""
    Image.new("RGB", (168, 112), (200, 30, 90)).save(tmp_path / "other.png")
    other = Record(
        "other", (ImageInput(path=str(tmp_path / "other.png")),), records[0].targets, records[0].turns, "", "",
        records[0].provenance,
    )  # fmt: skip
    one, two = score_regions(predictor(bundle), [records[0], other])
    assert abs(one.scores["R1"] - two.scores["R1"]) > 1e-3
    sample = predictor(bundle).region_sample(other, load_image(other.images[0]))
    assert sample.input_ids.count(bundle.processor.image_token_id) == (168 // 28) * (112 // 28)


def test_reading_leaves_generation_as_it_was(bundle: Any, records: list[Record]) -> None:
    asks = predictor(bundle)
    picture = load_image(records[1].images[0])
    verdicts = dict.fromkeys(names(records[1]), True)
    sample = asks.region_sample(records[1], picture, verdicts)
    before = asks.write_answers([sample], [verdicts])
    list(score_regions(asks, records))
    assert asks.write_answers([sample], [verdicts]) == before


def test_the_answer_goes_on_behind_the_verdicts_of_the_threshold(bundle: Any, records: list[Record]) -> None:
    scored = list(score_regions(predictor(bundle), records))
    middle = float(np.median([score for each in scored for score in each.scores.values()]))
    alone = list(explain_regions(predictor(bundle, 1), scored, middle))
    together = list(explain_regions(predictor(bundle, 4), scored, middle))
    assert alone == together
    assert {True, False} == {verdict for each in alone for verdict in each.verdicts.values()}
    for each in alone:
        assert each.verdicts == {name: score >= middle for name, score in each.scores.items()}
        (answer,) = each.answers
        start = answer_start(list(each.verdicts), list(each.verdicts.values()))
        assert answer.text.startswith(start)
        assert len(answer.text) > len(start)
        assert not answer.is_finished  # random weights do not know an end


def test_what_was_written_is_read_back_beside_the_probability(
    bundle: Any, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = predictor(bundle)
    tail = ' [{"id": "R2", "type": "crack", "confidence": 0.75, "reason": "一条裂缝"}]}'
    monkeypatch.setattr(
        RegionPredictor,
        "_generate_ids",
        lambda self, inputs: [asks.bundle.tokenizer.encode(tail)] * len(inputs["input_ids"]),
    )
    scored = ReadRegions(records[1], {"R1": 0.1, "R2": 0.9, "R3": 0.6, "R4": 0.2})
    (read,) = explain_regions(asks, [scored], 0.5)
    assert read.scores == scored.scores
    assert read.verdicts == {"R1": False, "R2": True, "R3": True, "R4": False}
    assert read.findings == {"R2": RegionFinding("R2", "crack", 0.75, "一条裂缝")}
    assert not read.answers[0].parsed.is_exact  # R3 is abnormal, and nothing is said of it


def test_many_candidates_are_asked_about_in_several_questions(bundle: Any, records: list[Record]) -> None:
    asks = predictor(bundle, 3)
    whole = list(score_regions(asks, records))
    parts = list(score_regions(asks, records, max_regions=2))
    for one, other, record in zip(whole, parts, records, strict=True):
        assert list(one.scores) == list(other.scores) == names(record)
    assert parts[0].scores == pytest.approx(whole[0].scores, abs=1e-5)
    assert parts[1].scores != pytest.approx(whole[1].scores, abs=1e-5)  # another question
    explained = list(explain_regions(asks, parts, 0.5, max_regions=2))
    assert [len(each.answers) for each in explained] == [1, 2, 1, 2]


def test_a_bad_record_comes_back_with_its_error_and_stops_nobody(
    bundle: Any, records: list[Record], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = [
        Record("gone", (ImageInput(path=str(broken)),), records[0].targets, records[0].turns, "", "b.jsonl:2",
               records[0].provenance),
        Record("none", records[0].images, records[0].targets, records[0].turns, "", "b.jsonl:3", {}),
    ]  # fmt: skip
    found = list(score_regions(predictor(bundle, 2), [records[0], *bad, records[2]]))
    assert [each.error is None for each in found] == [True, False, False, True]
    assert "record 'gone'" in str(found[1].error)
    assert "no candidate regions" in str(found[2].error)
    assert "b.jsonl:3" in str(found[2].error)
    assert found[1].scores == {}
    explained = list(explain_regions(predictor(bundle, 2), found, 0.5))
    assert [each.error for each in explained] == [each.error for each in found]
    assert isinstance(explained[1].error, DataFormatError)


def test_a_question_that_cannot_be_made_stops_nobody(tiny: Path, records: list[Record]) -> None:
    """Without its list of regions, a model that looks at them cannot be told where they are."""
    asks = predictor(load(tiny, region_features=True))
    bare = Record(
        "bare", records[0].images, records[0].targets, (Turn("user", "<image>Is R1 all right?"),), "", "b.jsonl:4",
        records[0].provenance,
    )  # fmt: skip
    found = list(score_regions(asks, [records[0], bare, records[2]]))
    assert [each.error is None for each in found] == [True, False, True]
    assert "no list of regions in the question" in str(found[1].error)


def test_answers_in_the_record_are_never_shown(bundle: Any, records: list[Record]) -> None:
    asks = predictor(bundle)
    picture = load_image(records[1].images[0])
    sample = asks.region_sample(records[1], picture)
    text = bundle.tokenizer.decode(sample.input_ids)
    assert "abnormal" not in text
    assert "R4: [" in text
    without = Record("x", records[1].images, records[1].targets, records[1].turns[:1], provenance=records[1].provenance)
    assert asks.region_sample(without, picture).input_ids == sample.input_ids
    rendered = Record(
        "x", records[1].images, records[1].targets, provenance={**records[1].provenance, "language": "en"}
    )
    assert load_region_template("en").question().splitlines()[0].split("<")[0] in bundle.tokenizer.decode(
        asks.region_sample(rendered, picture).input_ids
    )


# ---- where words begin and end ----


class _Merging:
    """A tokenizer whose pieces a pattern cuts out; ids by their text."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.known = pattern, list[str]()

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        pieces = list(re.finditer(self.pattern, text))
        assert "".join(piece[0] for piece in pieces) == text
        for piece in pieces:
            if piece[0] not in self.known:
                self.known.append(piece[0])
        return {
            "input_ids": [self.known.index(piece[0]) for piece in pieces],
            "offset_mapping": [piece.span() for piece in pieces],
        }

    def words(self, ids: list[int]) -> list[str]:
        return [self.known[each] for each in ids]


@pytest.mark.parametrize(
    ("pattern", "abnormal", "normal"),
    [
        (r"ab|normal|[^\w]|\w", ["ab", "normal"], ["normal"]),  # the shared end of the words is not left out
        (r"abnormal|normal|[^\w]+|\w", ["abnormal"], ["normal"]),
        (r'abnormal"|normal|"?[^\w"]+|"|\w', ['abnormal"', ", "], ["normal", '", ']),
        (r'\w+"[,}]|[^\w]|\w+', ['abnormal",'], ['normal",']),
        (r'"abn|"n|[a-z]+|[^\w]|\w', ['"abn', "ormal"], ['"n', "ormal"]),  # the quote before belongs to the word
    ],
)
def test_words_reach_to_where_both_continuations_are_the_same(
    pattern: str, abnormal: list[str], normal: list[str]
) -> None:
    tokenizer = _Merging(pattern)
    place = fork(tokenizer, ["R1", "R2"], [])
    assert tokenizer.words(place.abnormal) == abnormal
    assert tokenizer.words(place.normal) == normal
    start = "".join(tokenizer.words(place.shared))
    assert start in ('{"verdicts": {"R1": "', '{"verdicts": {"R1": ')


def test_the_start_of_an_answer_is_the_start_of_what_training_answers_say() -> None:
    ids = ["R1", '区域"2', "R3"]
    verdicts = [True, False, True]
    whole = write_answer(dict(zip(ids, verdicts, strict=True)), [RegionFinding("R1", "crack", 0.9, "...")])
    for count in range(4):
        assert whole.startswith(answer_start(ids, verdicts[:count]))
    assert answer_start(ids, []) == '{"verdicts": {"R1": "'
    assert answer_start(ids, [True]) == '{"verdicts": {"R1": "abnormal", "区域\\"2": "'
    assert answer_start(ids, verdicts).endswith('"R3": "abnormal"}, "abnormal":')


def check_prefixes(tokenizer: Any) -> None:
    """Ids of a start are the first ids of the whole answer, as training tokenises it."""
    for count, is_abnormal in ((1, True), (3, False), (12, True)):
        ids = [f"R{k + 1}" for k in range(count)]
        verdicts = [is_abnormal and k % 2 == 0 for k in range(count)]
        findings = [
            RegionFinding(name, "渗水", 0.9, "有水迹") for name, word in zip(ids, verdicts, strict=True) if word
        ]
        whole = tokenizer.encode(
            write_answer(dict(zip(ids, verdicts, strict=True)), findings) + "<|im_end|>", add_special_tokens=False
        )
        for decided in range(count + 1):
            start = tokenizer.encode(answer_start(ids, verdicts[:decided]), add_special_tokens=False)
            assert whole[: len(start)] == start
            if decided < count:
                place = fork(tokenizer, ids, verdicts[:decided])
                word = place.abnormal if verdicts[decided] else place.normal
                assert whole[: len(place.shared) + len(word)] == place.shared + word
                assert tokenizer.decode(place.abnormal) == "abnormal"
                assert tokenizer.decode(place.normal) == "normal"


def test_forced_text_is_tokenised_as_in_training(bundle: Any) -> None:
    check_prefixes(bundle.tokenizer)


@pytest.mark.real_data
def test_forced_text_is_tokenised_as_in_training_by_the_released_tokenizer(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    check_prefixes(AutoTokenizer.from_pretrained(shared_data / "qwen2_5_vl_processor"))
