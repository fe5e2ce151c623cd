"""`data.image_padding`: squares for the tower and the language model, of which the heads see the image alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import STREAM, collate, forward, load, record_named, samples_of

from finetune.config import DataConfig, ModelConfig
from finetune.data.image_frame import framed, padded_size, processed_size, resampled, set_frame, short_side_size
from finetune.data.preview import without_tokenizer
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query
from finetune.models.loading import Bundle, load_bundle, save_bundle
from finetune.schema import Turn

NAMES = ("tampered_150x211", "real_112x252", "tampered_224x196")
IMAGE_KEYS = ("pixel_values", "image_grid_thw", "mask_sizes_hw", "content_sizes_hw")
CELL = 28


@pytest.fixture(scope="module")
def bundle(tied: Path) -> Bundle:
    """Heads on tokens, a stream that the language model reads too; pads. Read only."""
    found = load(tied, noise_residual=replace(STREAM, to_language=True))
    torch.nn.init.normal_(found.base.stream_to_language.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    set_frame(found.processor.image_processor, padding="square")
    return found


@pytest.fixture(scope="module")
def on_tower(tied: Path) -> Bundle:
    """Heads on the vision tower; pads. Read only."""
    found = load(tied, source="vision", noise_residual=STREAM)
    set_frame(found.processor.image_processor, padding="square")
    return found


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), short=st.none() | st.integers(1, 900),
    cells=st.tuples(st.integers(1, 300), st.integers(1, 300)), extra=st.integers(0, 40),
)  # fmt: skip
def test_the_square_keeps_to_its_bounds_and_the_image_to_its_proportions(
    height: int, width: int, short: int | None, cells: tuple[int, int], extra: int
) -> None:
    least, most = (count * CELL**2 + extra for count in sorted(cells))
    config = DataConfig(image_padding="square", image_short_side=short, min_pixels=least, max_pixels=most)
    image_processor = without_tokenizer(config).image_processor
    wanted = short_side_size((height, width), image_processor)
    if max(wanted) > 200 * min(wanted):
        with pytest.raises(ValueError, match="200 times"):
            processed_size((height, width), image_processor)
        return
    size = processed_size((height, width), image_processor)
    side, other = padded_size(size, image_processor)
    assert side == other == max(size)
    assert all(edge >= CELL and edge % CELL == 0 for edge in size)
    assert side * side <= most
    assert side * side >= least or (side + CELL) ** 2 > most  # else the largest square that fits
    assert abs(min(size) - side * min(wanted) / max(wanted)) <= CELL / 2 or min(size) == CELL
    assert size[0] == size[1] or (size[0] > size[1]) == (wanted[0] > wanted[1])
    nearest = abs(side - max(wanted)) <= CELL / 2
    assert nearest or (side < max(wanted)) == ((side + CELL) ** 2 > most) or (side - CELL) ** 2 < least
    set_frame(image_processor, short)
    assert padded_size(size, image_processor) == size


@pytest.mark.parametrize(
    ("size_hw", "found"),
    [((200, 400), (224, 448)), ((240, 320), (336, 448)), ((100, 400), (112, 448)), ((900, 1200), (336, 448)),
     ((448, 896), (224, 448)), ((500, 500), (448, 448)), ((31, 17), (448, 252))],
)  # fmt: skip
def test_a_fixed_square_shows_every_shape_as_it_is(size_hw: tuple[int, int], found: tuple[int, int]) -> None:
    """As for a comparison with models of a fixed input: pictures of one shape look alike, whatever their size."""
    config = DataConfig(image_padding="square", min_pixels=448**2, max_pixels=448**2)
    assert processed_size(size_hw, without_tokenizer(config).image_processor) == found


def test_pixels_are_those_without_padding_and_the_rest_is_zero(bundle: Bundle, photo_records: Path) -> None:
    samples = samples_of(bundle, record_named(photo_records, *NAMES))
    batch = collate(bundle, samples)
    contents = batch["content_sizes_hw"]
    assert contents == [sample.processed_hw[0] for sample in samples]
    assert batch["image_grid_thw"].tolist() == [[1, max(size) // 14, max(size) // 14] for size in contents]
    image_token = bundle.processor.image_token_id
    counts = [sample.input_ids.count(image_token) for sample in samples]
    assert counts == [max(size) ** 2 // CELL**2 for size in contents]
    for sample, (height, width) in zip(samples, contents, strict=True):
        whole = framed(sample.images[0], bundle.processor.image_processor)
        assert whole.size == (max(height, width),) * 2
    image_processor = bundle.processor.image_processor
    contents_alone = [resampled(s.images[0], size, image_processor) for s, size in zip(samples, contents, strict=True)]
    ours = batch["pixel_values"].split(batch["image_grid_thw"].prod(dim=1).tolist())
    theirs = [
        image_processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
        for image in contents_alone
    ]
    for padded, alone, (height, width) in zip(ours, theirs, contents, strict=True):
        side, merge = max(height, width) // CELL, 2
        groups = padded.view(side, side, merge**2, -1)
        inside = groups[: height // CELL, : width // CELL].reshape(alone.shape)
        assert torch.equal(inside, alone)
        assert groups[height // CELL :].abs().max() < 0.02 if height < width else True  # half a grey level
        assert groups[:, width // CELL :].abs().max() < 0.02 if width < height else True
    assert any(height != width for height, width in contents)


def test_the_stream_sees_the_image_alone_and_maps_have_its_size(bundle: Bundle, photo_records: Path) -> None:
    names = NAMES[1:]  # of whole cells, so that they have one size with and without padding
    samples = samples_of(bundle, record_named(photo_records, *names))
    batch = collate(bundle, samples)
    seen: list[list[torch.Tensor]] = []
    handle = bundle.base.noise_residual.register_forward_hook(lambda _m, _i, output: seen.append(output))
    output = forward(bundle.model, batch)
    set_frame(bundle.processor.image_processor)
    plain = collate(bundle, samples_of(bundle, record_named(photo_records, *names)))
    assert "content_sizes_hw" not in plain
    without = forward(bundle.model, plain)
    set_frame(bundle.processor.image_processor, padding="square")
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert [tuple(m.shape) for m in output.mask_logits] == batch["mask_sizes_hw"]
    shapes = [tuple(f.shape) for f in output.mask_features]
    assert shapes == [tuple(f.shape) for f in without.mask_features]
    assert not torch.allclose(output.cls_logits, without.cls_logits)  # the tower does look at the padding
    sizes = forward(bundle.model, batch, mask_sizes_hw=None).mask_logits
    assert [tuple(m.shape) for m in sizes] == batch["content_sizes_hw"]


def test_a_batch_is_its_images_one_by_one(bundle: Bundle, photo_records: Path) -> None:
    samples = samples_of(bundle, record_named(photo_records, *NAMES))
    together = forward(bundle.model, collate(bundle, samples))
    for index, sample in enumerate(samples):
        alone = forward(bundle.model, collate(bundle, [sample]))
        torch.testing.assert_close(together.cls_logits[index], alone.cls_logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.mask_logits[index], alone.mask_logits[0], rtol=1e-4, atol=1e-4)


def test_the_language_model_reads_the_stream_at_the_image_s_own_tokens(bundle: Bundle, photo_records: Path) -> None:
    (sample,) = samples_of(bundle, record_named(photo_records, "real_112x252"))
    batch = collate(bundle, [sample])
    seen: dict[str, torch.Tensor] = {}
    base = bundle.base
    encode = base._add_stream

    def watched(vision: Any, read: Any) -> Any:
        seen["before"] = vision.pooler_output[0]
        return encode(vision, read)

    base._add_stream = watched
    pooled = []
    handle = base.model.language_model.register_forward_pre_hook(
        lambda _m, _a, k: pooled.append(k["inputs_embeds"]), with_kwargs=True
    )
    try:
        forward(bundle.model, batch)
    finally:
        handle.remove()
        del base._add_stream
    at_image = batch["mm_token_type_ids"].bool()
    added = (pooled[0][at_image] - seen["before"]).abs().sum(dim=-1).view(9, 9)
    assert (added[:4] > 0).all()
    assert not added[4:].any()


def test_heads_on_the_tower_read_the_upper_left_of_its_maps(on_tower: Bundle, photo_records: Path) -> None:
    batch = collate(on_tower, samples_of(on_tower, record_named(photo_records, *NAMES)))
    pixels, grid, contents = (batch[key] for key in ("pixel_values", "image_grid_thw", "content_sizes_hw"))
    with torch.no_grad():
        whole = on_tower.base.tower_maps(pixels, grid)
        parts = on_tower.base.tower_maps(pixels, grid, contents)
    for layer, cut in zip(whole, parts, strict=True):
        for full, part, (height, width) in zip(layer, cut, contents, strict=True):
            assert part.is_contiguous()  # as it is stored
            assert torch.equal(part, full[:, : height // 14, : width // 14])
    images = {"pixel_values": pixels, "image_grid_thw": grid, "content_sizes_hw": contents}
    with torch.no_grad():
        direct = on_tower.model(**images)
        stored = on_tower.model(**images, tower_maps=parts)
    assert torch.equal(direct.cls_logits, stored.cls_logits)
    assert [tuple(m.shape) for m in direct.mask_logits] == contents


@pytest.mark.parametrize("kind", ["bundle", "on_tower"])
def test_it_is_saved_and_the_predictor_follows_it(
    kind: str, photo_records: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    save_bundle(bundle, tmp_path / "model")
    loaded: Any = load_bundle(ModelConfig(path=str(tmp_path / "model")))
    assert processed_size((100, 300), loaded.processor.image_processor) == (112, 308)
    assert padded_size((112, 308), loaded.processor.image_processor) == (308, 308)
    records = record_named(photo_records, *NAMES)
    batch = collate(bundle, samples_of(bundle, records, mask_resolution="original"))
    with torch.no_grad():
        output = bundle.model(**{key: batch[key] for key in IMAGE_KEYS}) if kind == "on_tower" else None
    queries = [Query(record.id, record.images, (Turn("user", "<image>?"),)) for record in records]
    found = [p for answers in Predictor(loaded).predict(queries, with_text=False) for p in answers]
    for number, (record, prediction) in enumerate(zip(records, found, strict=True)):
        height, width = map(int, record.id.rpartition("_")[2].split("x"))
        assert prediction.size_hw == (height, width)
        assert prediction.mask_scores is not None
        assert prediction.mask_scores.shape == (height, width)
        if output is not None:  # heads on tokens have read another question here
            expected = output.mask_logits[number].sigmoid()
            torch.testing.assert_close(torch.from_numpy(prediction.mask_scores), expected, rtol=1e-4, atol=1e-4)
