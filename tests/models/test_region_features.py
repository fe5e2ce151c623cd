"""What the tower saw in a box reaches the tokens that name it: pooling, the model's own forward, saving, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from model_helpers import collate, forward
from PIL import Image

from finetune.config import DataConfig, HeadsConfig, LoraConfig, ModelConfig
from finetune.data.collator import MODEL_KEYS
from finetune.data.dataset import ForensicDataset
from finetune.data.regions.wording import load_region_template
from finetune.errors import ConfigError
from finetune.models.adapters import set_trainable
from finetune.models.export import merge
from finetune.models.groups import parameter_groups
from finetune.models.loading import Bundle, load_bundle, save_bundle
from finetune.models.region_features import box_weights, pool_regions, spread
from finetune.schema import ImageInput, ImageTarget, Record, Turn

ATOL = 5e-5
SIZES_HW = [(112, 168), (150, 97), (84, 84), (140, 224)]
BOXES = [[(0, 0, 40, 40), (60, 30, 150, 100)], [(3, 3, 12, 9)], [(10, 20, 80, 80), (0, 0, 30, 84), (40, 2, 60, 50)], []]
"""One smaller than a cell; the last record is about no region."""


# ---- pooling ----


def test_weights_are_the_covered_part_of_each_cell() -> None:
    weights = box_weights(torch.tensor([[14.0, 7.0, 70.0, 28.0], [-50.0, -50.0, 500.0, 500.0]]), (2, 3), 28)
    expected = torch.tensor([[0.5 * 0.75, 0.75, 0.5 * 0.75], [0, 0, 0]])
    torch.testing.assert_close(weights[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(weights[1], torch.ones(2, 3), rtol=0, atol=0)


@pytest.mark.parametrize("grid_hw", [(3, 5), (7, 2), (1, 9)])
def test_the_marked_cell_is_found(grid_hw: tuple[int, int]) -> None:
    """Every cell of an odd grid has its own number; a box within one cell, or over it, gives that number."""
    height, width = grid_hw
    tokens = torch.arange(height * width).float()[:, None].repeat(1, 4)
    for number in range(height * width):
        x, y = 28 * (number % width), 28 * (number // width)
        boxes = torch.tensor([[x, y, x + 28, y + 28], [x + 5, y + 9, x + 7, y + 10]]).float()
        pooled = pool_regions(tokens, boxes, grid_hw, 28)
        torch.testing.assert_close(pooled, torch.full((2, 8), float(number)))


def test_mean_and_maximum_by_hand() -> None:
    """Half of cell 0, a quarter of cell 1; cell 1 is half as covered as cell 0, so that both count for the maximum."""
    tokens = torch.tensor([[2.0, 9.0], [8.0, 1.0], [50.0, 50.0], [60.0, 60.0]])  # a 2 x 2 grid
    pooled = pool_regions(tokens, torch.tensor([[14.0, 0.0, 35.0, 28.0]]), (2, 2), 28)
    mean = [(2 * 0.5 + 8 * 0.25) / 0.75, (9 * 0.5 + 1 * 0.25) / 0.75]
    torch.testing.assert_close(pooled, torch.tensor([[*mean, 8.0, 9.0]]))


def test_a_touched_cell_has_no_part_in_the_maximum() -> None:
    tokens = torch.tensor([[2.0], [8.0]])
    pooled = pool_regions(tokens, torch.tensor([[0.0, 0.0, 31.0, 28.0]]), (1, 2), 28)
    torch.testing.assert_close(pooled, torch.tensor([[(2 + 8 * 3 / 28) / (1 + 3 / 28), 2.0]]))


def test_whole_image_and_padding() -> None:
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool_regions(tokens, torch.tensor([[0.0, 0.0, 84.0, 56.0], [0.0, 0.0, 0.0, 0.0]]), (2, 3), 28)
    torch.testing.assert_close(pooled[0], torch.cat([tokens.mean(dim=0), tokens.amax(dim=0)]))
    assert not pooled[1].any()


def test_spread_puts_each_row_where_it_is_named() -> None:
    features = torch.arange(1.0, 9.0).view(2, 2, 2)
    found = spread(features, torch.tensor([[0, 2, 1], [1, 0, 0]]))
    expected = [[[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]], [[5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0)


# ---- the model ----


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Pictures of odd sizes with none to three candidates."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    template = load_region_template("en")
    for number, ((height, width), boxes) in enumerate(zip(SIZES_HW, BOXES, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        regions = [{"id": f"R{k + 1}", "box_xyxy": list(box), "type": None} for k, box in enumerate(boxes)]
        turns = (Turn("user", template.question()), Turn("assistant", template.answer({r["id"]: "a" for r in regions})))
        if not boxes:
            turns = (Turn("user", "<image>What is it?"), Turn("assistant", "Nothing."))
        provenance = {"regions": regions, "positive_region_ids": []} if boxes else {}
        image = ImageInput(path=str(folder / f"{number}.png"))
        found.append(Record(f"r{number}", (image,), (ImageTarget(),), turns, provenance=provenance))
    return found


def load(path: Path, *, region_features: bool = True, has_heads: bool = False, **more: Any) -> Bundle:
    config = ModelConfig(path=str(path), dtype="float32", region_features=region_features, **more)
    bundle = load_bundle(config, heads=HeadsConfig(enabled=has_heads, hidden_size=32, num_layers=1, num_heads=4))
    bundle.model.eval()
    return bundle


def samples_of(bundle: Bundle, records: list[Record]) -> list[Any]:
    looks = bundle.base.config.region_features
    dataset = ForensicDataset(records, bundle.processor, bundle.tokens, DataConfig(), region_features=looks)
    return [dataset[i] for i in range(len(dataset))]


def moved(bundle: Bundle) -> Bundle:
    """A projection as it might be after training, with effects that can be seen."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in bundle.base.region_projection.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return bundle


@pytest.fixture(scope="module")
def seeing(tied: Path) -> Bundle:
    return moved(load(tied))


def test_new_features_change_nothing(tied: Path, records: list[Record]) -> None:
    """Zero at the start: logits are those without them, bit by bit; without them the batch is what it was."""
    new, without = load(tied), load(tied, region_features=False)
    assert not hasattr(without.base, "region_projection")
    plain_batch = collate(without, samples_of(without, records))
    assert "region_boxes" not in plain_batch
    expected = forward(without.model, plain_batch).logits
    found = forward(new.model, collate(new, samples_of(new, records))).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batch_equals_single_samples(
    seeing: Bundle, records: list[Record], padding_side: Literal["left", "right"]
) -> None:
    samples = samples_of(seeing, records)
    batch = collate(seeing, samples, padding_side)
    assert batch["region_boxes"].shape == (4, 3, 4)
    output = forward(seeing.model, batch)
    for row, sample in enumerate(samples):
        alone = forward(seeing.model, collate(seeing, [sample]))
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(output.logits[row, real], alone.logits[0], rtol=0, atol=ATOL)


def test_only_text_behind_the_first_id_reads_a_region(seeing: Bundle, records: list[Record]) -> None:
    """Another box at the first id changes logits from that token on, and none before."""
    (sample,) = samples_of(seeing, records[2:3])
    batch = collate(seeing, [sample])
    before = forward(seeing.model, batch).logits[0]
    batch["region_boxes"][0, 0] = torch.tensor([28.0, 28.0, 84.0, 84.0])
    after = forward(seeing.model, batch).logits[0]
    first = sample.region_tokens[0][0]
    torch.testing.assert_close(after[:first], before[:first], rtol=0, atol=0)
    assert (after[first:] - before[first:]).abs().amax(dim=1).min() > 1e-3


def test_heads_and_regions_together(tied: Path, records: list[Record]) -> None:
    """Heads off or on, the text reads the same; the tower runs once for both."""
    both, calls = moved(load(tied, has_heads=True)), []
    both.base.model.visual.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(both, samples_of(both, records[:2]))
    found = forward(both.model, batch)
    assert len(calls) == 1
    seeing_text = moved(load(tied))
    torch.testing.assert_close(found.logits, forward(seeing_text.model, batch).logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("has_heads", [False, True])
def test_generation_equals_whole_forward_passes(tied: Path, records: list[Record], has_heads: bool) -> None:
    """With a cache, left-padded in a batch: each step's logits are those of the whole text without a cache."""
    bundle = moved(load(tied, has_heads=has_heads))
    samples = samples_of(bundle, records)
    for sample in samples:
        sample.labels = [-100] * len(sample.input_ids)
    batch = {k: v for k, v in collate(bundle, samples, "left").items() if k in GENERATE_KEYS}
    made = bundle.model.generate(
        **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    length = batch["input_ids"].shape[1]
    for row, sample in enumerate(samples):
        written = made.sequences[row, length:].tolist()
        for step, scores in enumerate(made.logits):
            sample.input_ids, sample.labels = samples_ids(samples, row, batch) + written[:step], []
            sample.labels = [-100] * len(sample.input_ids)
            whole = forward(bundle.model, collate(bundle, [sample])).logits[0, -1]
            torch.testing.assert_close(scores[row], whole, rtol=0, atol=2 * ATOL)
            if written[step] in (bundle.tokenizer.eos_token_id, bundle.tokenizer.pad_token_id):
                break


GENERATE_KEYS = {key for key in MODEL_KEYS if key not in ("logits_to_keep", "mask_sizes_hw")}


def samples_ids(samples: list[Any], row: int, batch: dict[str, Any]) -> list[int]:
    """The prompt of a row, without its padding."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


# ---- saving and training ----


def test_whole_model_is_found_again(tied: Path, records: list[Record], tmp_path: Path) -> None:
    """Also where nothing is said of regions when it is loaded: the folder knows."""
    bundle = moved(load(tied))
    save_bundle(bundle, tmp_path / "saved")
    again = load_bundle(ModelConfig(path=str(tmp_path / "saved"), dtype="float32"))
    again.model.eval()
    batch = collate(again, samples_of(again, records))
    torch.testing.assert_close(forward(again.model, batch).logits, forward(bundle.model, batch).logits, rtol=0, atol=0)


def test_regions_come_to_a_folder_with_heads(tied: Path, tmp_path: Path) -> None:
    """Its heads stay what they were."""
    first = load(tied, region_features=False, has_heads=True)
    with torch.no_grad():
        first.base.cls_head.out.weight.add_(1)
    save_bundle(first, tmp_path / "heads")
    later = load_bundle(ModelConfig(path=str(tmp_path / "heads"), dtype="float32", region_features=True))
    torch.testing.assert_close(later.base.cls_head.out.weight, first.base.cls_head.out.weight, rtol=0, atol=0)
    assert not later.base.region_projection.out.weight.any()


def test_adapter_holds_them_and_merging_keeps_them(tied: Path, records: list[Record], tmp_path: Path) -> None:
    lora = LoraConfig(r=2, alpha=4)
    bundle = moved(set_trainable(load(tied), ["lm_lora", "region_features"], lora))
    groups = parameter_groups(bundle.model, ["lm_lora", "region_features"])
    assert sorted(name.rsplit("default.", 1)[-1] for name, _ in groups["region_features"]) == [
        "norm.bias", "norm.weight", "out.bias", "out.weight",
    ]  # fmt: skip
    bundle.model.eval()
    batch = collate(bundle, samples_of(bundle, records))
    expected = forward(bundle.model, batch).logits
    save_bundle(bundle, tmp_path / "adapter")
    again = load_bundle(ModelConfig(path=str(tmp_path / "adapter"), dtype="float32"))
    again.model.eval()
    torch.testing.assert_close(forward(again.model, batch).logits, expected, rtol=0, atol=0)
    continued = set_trainable(again, ["lm_lora"], lora)  # it is kept where it does not train on
    continued.model.eval()
    torch.testing.assert_close(forward(continued.model, batch).logits, expected, rtol=0, atol=0)
    merge(str(tmp_path / "adapter"), None, tmp_path / "merged")
    merged = load_bundle(ModelConfig(path=str(tmp_path / "merged"), dtype="float32"))
    merged.model.eval()
    torch.testing.assert_close(forward(merged.model, batch).logits, expected, rtol=0, atol=ATOL)
    with pytest.raises(ConfigError, match="region_features"):
        merge(str(tmp_path / "adapter"), None, tmp_path / "plain", plain=True)


def test_gradients_reach_the_projection_and_only_it(tied: Path, records: list[Record]) -> None:
    """From the first step; a batch without regions gives it a gradient of zero instead of none."""
    bundle = set_trainable(load(tied), ["region_features"], LoraConfig())
    trained = {name for name, p in bundle.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"region_projection"}
    bundle.model.train()
    samples = samples_of(bundle, records)
    for rows, has_regions in ((samples, True), (samples[3:], False)):
        bundle.model.zero_grad()
        batch = collate(bundle, rows)
        keys = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        regions = {key: batch[key] for key in ("region_boxes", "region_index") if key in batch}
        output = bundle.model(**{key: batch[key] for key in keys}, **regions)
        (output.logits.square().mean() + output.branch_anchor).backward()
        gradient = bundle.base.region_projection.out.weight.grad
        assert bool(gradient.any()) is has_regions


def test_the_group_needs_the_module(tied: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.region_features: true"):
        set_trainable(load(tied, region_features=False), ["region_features"], LoraConfig())


def test_features_that_would_stay_zero_are_refused(tied: Path) -> None:
    """New ones without their group; ones that were trained may rest."""
    with pytest.raises(ConfigError, match="add the group"):
        set_trainable(load(tied), ["lm_lora"], LoraConfig())
    set_trainable(moved(load(tied)), ["lm_lora"], LoraConfig(r=2))
