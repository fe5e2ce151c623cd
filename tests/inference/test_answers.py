"""Answers read back: what training writes for a mask comes out of the text as the same regions of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConfig, GenerationConfig
from finetune.data.answer_polygons import PolygonFrame
from finetune.data.dataset import ForensicDataset
from finetune.data.image_frame import processed_size
from finetune.data.masks import rasterize_polygons
from finetune.data.template import load_template
from finetune.inference.answers import read_answers
from finetune.inference.output import as_line
from finetune.inference.predictor import Predictor
from finetune.inference.queries import query_for_image
from finetune.schema import ImageInput, ImageTarget, Record
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens

TOKENS = SpecialTokens(1, 4)
SIZES = {"shrunk": (700, 1100), "enlarged": (61, 83), "flat": (70, 640), "tall": (590, 75)}


@pytest.fixture(scope="module")
def processor(tiny_dir: Path) -> Any:
    """Bounds that enlarge the small sizes and shrink the large ones."""
    from finetune.models.loading import add_forensic_tokens, load_processor

    loaded = load_processor(tiny_dir, min_pixels=28 * 28 * 30, max_pixels=28 * 28 * 60)
    add_forensic_tokens(loaded.tokenizer, TOKENS)
    return loaded


def tampered(folder: Path, name: str) -> tuple[Record, np.ndarray]:
    """A record whose mask is an ellipse and a slanted box, and that mask."""
    height, width = SIZES[name]
    mask = np.zeros((height, width), np.uint8)
    cv2.ellipse(mask, (width // 3, height // 3), (width // 5, height // 5), 0, 0, 360, 1, -1)
    box = np.array([(0.6, 0.7), (0.9, 0.6), (0.95, 0.9), (0.65, 0.95)]) * (width, height)
    cv2.fillPoly(mask, [box.astype(np.int32)], 1)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(mask * 255).save(folder / f"{name}_mask.png")
    target = ImageTarget(label=1, mask_path=str(folder / f"{name}_mask.png"))
    return Record(name, (ImageInput(path=str(folder / f"{name}.png")),), (target,)), mask


def written_answer(dataset: ForensicDataset, index: int) -> str:
    """The text the model is taught: the supervised ids, decoded."""
    sample = dataset[index]
    taught = [label for label in sample.labels if label != IGNORE_INDEX]
    return str(TOKENS.strip(dataset.processor.tokenizer.decode(taught)).removesuffix("<|im_end|>"))


@pytest.mark.parametrize("budget", [{"max_polygon_points": 40}, {"max_polygon_tokens": 260}])
@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
@pytest.mark.parametrize("layout", ["tokens_first", "text_first"])
@pytest.mark.parametrize("name", SIZES)
def test_mask_to_text_and_back(
    processor: Any, tmp_path: Path, name: str, layout: Any, coordinates: Any, budget: dict[str, Any]
) -> None:
    record, mask = tampered(tmp_path, name)
    config = DataConfig(polygon_coordinates=coordinates, layout=layout, **budget)
    text = written_answer(ForensicDataset([record], processor, TOKENS, config), 0)
    size = SIZES[name]
    frame = PolygonFrame(coordinates, size, processed_size(size, processor.image_processor))
    answers = read_answers(text, load_template(config.template), 1, [frame])
    assert answers is not None
    assert answers[0].label == 1
    back = rasterize_polygons(answers[0].polygons, size)
    assert (back & mask).sum() / (back | mask).sum() > 0.9
    if budget.get("max_polygon_tokens"):
        written = text[text.index("[[") : text.index("]]") + 2]
        assert len(processor.tokenizer.encode(written)) <= 260


def test_relative_coordinates_are_thousandths(processor: Any, tmp_path: Path) -> None:
    record, _ = tampered(tmp_path, "enlarged")
    lists = {}
    for coordinates in ("absolute", "relative"):
        config = DataConfig(polygon_coordinates=coordinates)  # type: ignore[arg-type]
        lists[coordinates] = json.loads(written_answer(ForensicDataset([record], processor, TOKENS, config), 0))["mask"]
    height, width = processed_size(SIZES["enlarged"], processor.image_processor)
    for axis, side in ((0, width), (1, height)):
        largest = [max(max(row) for row in lists[kind][axis::2]) for kind in ("absolute", "relative")]
        assert largest[0] <= side
        assert largest[1] / 1000 == pytest.approx(largest[0] / side, abs=1 / side)


def test_several_images_each_in_its_own_frame() -> None:
    template = load_template("zh")
    one = '{"result": "fake", "mask": [[0, 500, 1000], [0, 1000, 1000]], "evidence": "x"}'
    frames = [PolygonFrame("relative", size, (56, 56)) for size in ((100, 200), (40, 10))]
    answers = read_answers(f"[{one}, {one}]", template, 2, frames)
    assert answers is not None
    assert answers[0].polygons == (((0.0, 0.0), (100.0, 100.0), (200.0, 100.0)),)
    assert answers[1].polygons == (((0.0, 0.0), (5.0, 40.0), (10.0, 40.0)),)
    assert read_answers(f"[{one}]", template, 2, frames) is None
    as_written = read_answers(one, template, 1)
    assert as_written is not None
    assert as_written[0].polygons == (((0.0, 0.0), (500.0, 1000.0), (1000.0, 1000.0)),)


@pytest.mark.parametrize(
    ("stored", "corner"), [({}, (112, 56)), ({"polygon_coordinates": "relative"}, (1000, 1000))]
)  # 50x100 is seen as 56x112
def test_model_folder_says_what_its_coordinates_are(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, str], corner: tuple[int, int]
) -> None:
    """Folders from before there was a choice hold pixels of the resized image."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(bundle, "settings", {**bundle.settings, **stored})
    predictor = Predictor(bundle, GenerationConfig(max_new_tokens=1))
    text = json.dumps({"result": "fake", "mask": [[0, corner[0], 0], [0, 0, corner[1]]]})
    monkeypatch.setattr(predictor, "_decode", lambda _: text)
    ((prediction,),) = predictor.predict([query_for_image(str(tmp_path / "a.png"), predictor.template)])
    assert prediction.text_polygons == (((0.0, 0.0), (100.0, 0.0), (0.0, 50.0)),)
    assert as_line(prediction, None)["text_polygons"] == [[[0.0, 0.0], [100.0, 0.0], [0.0, 50.0]]]
