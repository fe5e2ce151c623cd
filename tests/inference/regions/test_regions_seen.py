"""A model that looks at regions itself is asked as it was trained: the same boxes at the same tokens, in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import DataConfig, GenerationConfig, HeadsConfig, ModelConfig
from finetune.data.corpus import tokenizer_corpus
from finetune.data.dataset import ForensicDataset
from finetune.data.images import load_image
from finetune.data.regions.wording import load_region_template, write_answer
from finetune.inference.regions.predictor import RegionPredictor, score_regions
from finetune.models.loading import Bundle, load_bundle, save_bundle
from finetune.models.tiny import TinyShape, build_tiny
from finetune.schema import ImageInput, ImageTarget, Record, Turn


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Saved with features that count and weights large enough to see it, and loaded again without being told.

    Both words of a verdict are tokens of their own, so that neither is nearly impossible.
    """
    words = [write_answer({"R1": True, "R2": False}, [])] * 200
    tiny = build_tiny(
        tmp_path_factory.mktemp("model") / "tiny", [*tokenizer_corpus(), *words], TinyShape(vocab_size=600)
    )
    config = ModelConfig(path=str(tiny), dtype="float32", region_features=True)
    made = load_bundle(config, heads=HeadsConfig(enabled=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if name == "region_projection.out.weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.mul_(10 if "embed_tokens" in name else 4)
    folder = tmp_path_factory.mktemp("model") / "saved"
    save_bundle(made, folder)
    return load_bundle(ModelConfig(path=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder, template, found = tmp_path_factory.mktemp("pictures"), load_region_template("zh"), []
    for number, (height, width) in enumerate([(112, 168), (150, 97), (84, 84)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        regions = [{"id": f"R{k + 1}", "box_xyxy": [9 * k, 5, 9 * k + 40, 60], "type": None} for k in range(number + 1)]
        answer = template.answer({region["id"]: None for region in regions})
        turns = (Turn("user", template.question()), Turn("assistant", answer))
        provenance = {"regions": regions, "positive_region_ids": []}
        image = ImageInput(path=str(folder / f"{number}.png"))
        found.append(Record(f"r{number}", (image,), (ImageTarget(),), turns, provenance=provenance))
    return found


def asks(bundle: Bundle, batch_size: int) -> RegionPredictor:
    return RegionPredictor(bundle, GenerationConfig(batch_size=batch_size, max_new_tokens=4), device="cpu")


def test_question_is_that_of_training(bundle: Bundle, records: list[Record]) -> None:
    dataset = ForensicDataset(records, bundle.processor, bundle.tokens, DataConfig(), region_features=True)
    for number, record in enumerate(records):
        trained = dataset[number]
        asked = asks(bundle, 1).region_sample(record, load_image(record.images[0]))
        assert asked.region_boxes == trained.region_boxes != []
        assert asked.region_tokens == trained.region_tokens
        assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
        begun = asks(bundle, 1).region_sample(record, load_image(record.images[0]), {"R1": True})
        assert begun.region_tokens == asked.region_tokens


def test_scores_read_the_features_and_no_batch(bundle: Bundle, records: list[Record]) -> None:
    """The same in a left-padded batch and alone; others once the projection is set to zero."""
    alone = [each.scores for each in score_regions(asks(bundle, 1), records)]
    together = [each.scores for each in score_regions(asks(bundle, 3), records)]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    weight = bundle.base.region_projection.out.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    blind = [each.scores for each in score_regions(asks(bundle, 3), records)]
    with torch.no_grad():
        weight.copy_(kept)
    assert max(abs(one[name] - other[name]) for one, other in zip(alone, blind, strict=True) for name in one) > 0.01
