"""Test-time augmentation: copies keep JPEG's grid and come back where they were; logits are averaged, texts are not."""

from __future__ import annotations

import dataclasses
import io
import json
import weakref
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

from finetune.cli import build_parser, main
from finetune.config import GenerationConfig, HeadsConfig, ModelConfig, TestTimeAugmentation
from finetune.config.vision_runs import VisionInferenceConfig, load_vision_config
from finetune.data.chat import question_turns
from finetune.data.readers import read_records
from finetune.errors import ConfigError
from finetune.inference.evidence.inspection import influential
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, queries_of
from finetune.inference.tta import IDENTITY, VIEWS, MeanMap, View
from finetune.models.loading import load_bundle
from finetune.schema import ImageInput

ALL = VIEWS["dihedral"]


def picture_of(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_names_are_those_of_the_settings_and_of_the_command_line() -> None:
    assert tuple(VIEWS) == get_args(TestTimeAugmentation)
    assert [len(set(views)) for views in VIEWS.values()] == [1, 2, 4, 8]
    assert all(views[0] == IDENTITY for views in VIEWS.values())
    for name in VIEWS:
        assert build_parser().parse_args(["predict", "a.png", "--model", "m", "--tta", name]).tta == name


@pytest.mark.parametrize("view", ALL)
@pytest.mark.parametrize("size", [(32, 48), (36, 27), (23, 16), (5, 30), (8, 15)])
def test_a_map_comes_back_where_the_picture_was(view: View, size: tuple[int, int]) -> None:
    """The brightness of the copy, taken as its score map, is the brightness of the picture in what comes back."""
    picture = picture_of(*size)
    copy = view.of(picture)
    assert (copy.height, copy.width) == (size[::-1] if view.transposed else size)
    back = view.back(np.asarray(copy, np.float32)[..., 0])
    original = np.asarray(picture, np.float32)[..., 0]
    blocks = [16 if side >= 16 else 8 if side >= 8 else 1 for side in size]
    shown = [
        side - side % block if is_mirrored else side
        for side, block, is_mirrored in zip(size, blocks, view[:2], strict=True)
    ]
    assert back.shape == tuple(shown)
    np.testing.assert_array_equal(back, original[: shown[0], : shown[1]])


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("view", ALL)
def test_blocks_of_the_grid_stay_whole(view: View, side: int) -> None:
    """Every block of brightness and of halved colour that is not at a cut edge is a block of the copy's grid."""
    picture = picture_of(60, 76)

    def blocks(image: Image.Image) -> set[bytes]:
        pixels = np.asarray(image)
        rows, columns = image.height // side, image.width // side
        return {
            pixels[side * i : side * (i + 1), side * j : side * (j + 1)].tobytes()
            for i in range(rows if image.height != 60 else 48 // side)
            for j in range(columns if image.width != 76 else 64 // side)
        }

    def copied(block: bytes) -> bytes:
        return view.of(Image.fromarray(np.frombuffer(block, np.uint8).reshape(side, side, 3))).tobytes()

    assert {copied(block) for block in blocks(picture)} <= blocks(view.of(picture))


def test_colour_of_a_jpeg_keeps_its_grid() -> None:
    """The spectra that the noise-residual stream reads are those of the picture: at 4:2:0 their blocks are of 16."""
    from finetune.models.forensic_statistics import chroma_spectrum

    stream = io.BytesIO()
    smooth = Image.fromarray(np.random.default_rng(2).integers(0, 255, (25, 32, 3), dtype=np.uint8))
    smooth.resize((256, 200), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=60, subsampling=2)
    picture = Image.open(stream).convert("RGB")

    def spectrum(image: Image.Image) -> torch.Tensor:
        colour = torch.from_numpy(np.array(image.convert("YCbCr"))[..., 1:]).permute(2, 0, 1)[None].float()
        return chroma_spectrum(colour).mean(dim=(0, 2, 3))

    upright, mirrored = spectrum(picture), spectrum(View(True, False, False).of(picture))
    wrong = spectrum(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    torch.testing.assert_close(mirrored, upright, atol=1e-4, rtol=0)
    assert (wrong - upright).abs().max() > 0.1


def test_the_mean_leaves_out_what_a_copy_does_not_show() -> None:
    mean = MeanMap(np.array([[1.0, 2.0]], np.float32))
    np.testing.assert_array_equal(mean.mean, [[1.0, 2.0]])
    mean.add(np.array([[3.0]], np.float32))
    assert mean.mean.dtype == np.float32
    np.testing.assert_array_equal(mean.mean, [[2.0, 2.0]])
    mean.add(np.array([[np.nan, 2.0]], np.float32))  # of a model that overflowed: not passed over
    np.testing.assert_array_equal(mean.mean, [[np.nan, 2.0]])


@pytest.mark.parametrize("where", ["tokens", "tower"])
def test_scores_and_maps_are_means_over_the_copies(
    where: str, bundle: Any, vision_parts: Path, photo_records: Path
) -> None:
    """Against single predictions of every copy, put together by hand; the text is that of the picture itself."""
    model = bundle if where == "tokens" else load_bundle(ModelConfig(path=str(vision_parts)))
    settings = GenerationConfig(batch_size=3, max_new_tokens=4)
    plain = Predictor(model, settings, device="cpu")
    averaged = Predictor(model, dataclasses.replace(settings, tta="dihedral"), device="cpu")
    records = [record for record in read_records(photo_records) if record.images]
    asked = list(queries_of(records, lambda record: question_turns(record, plain.template)))
    pictures = [[Image.open(image.path).convert("RGB") for image in query.images] for query in asked]

    def all_of(predictor: Predictor, view: View, with_text: bool = False) -> list[Any]:
        turned = [[view.of(picture) for picture in own] for own in pictures]
        return [p for own in predictor.predict_batch(asked, turned, with_text=with_text) for p in own]

    single = {view: all_of(plain, view) for view in ALL}
    found = all_of(averaged, IDENTITY, with_text=True)
    texts = [p.text for p in all_of(plain, IDENTITY, with_text=True)]
    assert [p.text for p in found] == texts
    assert len({round(single[view][0].score, 6) for view in ALL}) > 1  # the model is not symmetric by itself
    for k, prediction in enumerate(found):
        copies = [single[view][k] for view in ALL]
        assert prediction.score == pytest.approx(expit(np.mean([logit(p.score) for p in copies])), abs=1e-5)
        height, width = prediction.size_hw
        maps = np.full((8, height, width), np.nan)
        for view, p, of_view in zip(ALL, copies, maps, strict=True):
            part = view.back(logit(p.mask_scores))
            of_view[: part.shape[0], : part.shape[1]] = part
        np.testing.assert_allclose(prediction.mask_scores, expit(np.nanmean(maps, axis=0)), atol=1e-4)
        assert prediction.size_hw == single[IDENTITY][k].size_hw


def test_calibration_sees_the_mean_of_the_logits(vision_parts: Path) -> None:
    seen: list[np.ndarray] = []

    def keep(logits: np.ndarray) -> np.ndarray:
        seen.append(logits)
        return expit(logits / 2)

    model = load_bundle(ModelConfig(path=str(vision_parts)))
    picture = picture_of(84, 90)
    query = Query("a", (ImageInput(path="a.png"),), ())
    plain = Predictor(model, GenerationConfig(), device="cpu")
    copies = [plain.predict_batch([query], [[view.of(picture)]])[0][0].score for view in VIEWS["hflip"]]
    averaged = Predictor(model, GenerationConfig(tta="hflip"), device="cpu", calibration=keep)
    ((prediction,),) = averaged.predict_batch([query], [[picture]])
    mean = np.mean(logit(copies))
    np.testing.assert_allclose(seen, [[mean]], atol=1e-5)
    assert prediction.score == pytest.approx(expit(mean / 2), abs=1e-5)
    assert prediction.raw_score == pytest.approx(expit(mean), abs=1e-5)


def test_shares_of_operations_are_averaged(tiny_dir: Path) -> None:
    heads = HeadsConfig(
        source="vision", vision_layers=[0, 2], hidden_size=16, num_layers=1, num_heads=2, operations=["splice", "erase"]
    )
    model = load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), heads=heads)
    with torch.no_grad():
        for parameter in model.base.operation_head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    query, picture = Query("a", (ImageInput(path="a.png"),), ()), picture_of(84, 112)
    plain = Predictor(model, GenerationConfig(), device="cpu")
    copies = [plain.predict_batch([query], [[view.of(picture)]])[0][0].operations for view in VIEWS["flips"]]
    averaged = Predictor(model, GenerationConfig(tta="flips"), device="cpu")
    found = averaged.predict_batch([query], [[picture]])[0][0].operations
    assert found is not None
    assert found["splice"] == pytest.approx(np.mean([each["splice"] for each in copies if each]), abs=1e-6)
    assert found["splice"] != pytest.approx(copies[0]["splice"] if copies[0] else 0, abs=1e-4)


def test_one_copy_at_a_time_is_in_memory(bundle: Any, photo_records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither outputs nor caches of earlier copies are held while the next is computed."""
    kept: list[weakref.ref[Any]] = []
    forward = bundle.base.forward

    def counting(*arguments: Any, **options: Any) -> Any:
        assert [output for reference in kept if (output := reference()) is not None] == []
        output = forward(*arguments, **options)
        assert output.past_key_values is None
        kept.append(weakref.ref(output.mask_logits[0]))
        return output

    monkeypatch.setattr(bundle.base, "forward", counting)
    predictor = Predictor(bundle, GenerationConfig(tta="flips"), device="cpu")
    records = [record for record in read_records(photo_records) if record.images][:1]
    asked = list(queries_of(records, lambda record: question_turns(record, predictor.template)))
    list(predictor.predict(asked, with_text=False))
    assert len(kept) == 4


def test_a_model_without_heads_has_nothing_to_average(tiny_dir: Path) -> None:
    model = load_bundle(ModelConfig(path=str(tiny_dir), dtype="float32"), heads=HeadsConfig(enabled=False))
    for layout in ("tokens_first", "text_first"):
        with pytest.raises(ConfigError, match=r"tta is flips, but this model has no heads"):
            Predictor(model, GenerationConfig(tta="flips"), layout=layout)


def test_heads_that_read_the_answer_have_one_view_only(bundle: Any) -> None:
    with pytest.raises(ConfigError, match=r"tta is flips, but this model's heads read the answer.*give tta none"):
        Predictor(bundle, GenerationConfig(tta="flips"), layout="text_first")


def test_both_evaluations_average_alike_and_say_so(vision_parts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    entries = []
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (84, 92, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        entries.append({"image_path": f"{number}.png", "mask_path": "84x92", "label": 0})
        if number % 2:
            mask = np.zeros((84, 92), np.uint8)
            mask[20:60, 30:80] = 255
            Image.fromarray(mask).save(tmp_path / f"{number}_mask.png")
            entries[-1] |= {"mask_path": f"{number}_mask.png", "label": 1}
    data = tmp_path / "e.json"
    data.write_text(json.dumps(entries), encoding="utf-8")
    config = {"head_checkpoint": str(vision_parts), "ann_eval": str(data), "device": "cpu", "tta": "dihedral"}
    (tmp_path / "c.json").write_text(json.dumps({**config, "inference_output": str(tmp_path / "v")}), encoding="utf-8")
    assert main(["vision", "evaluate", "--config", str(tmp_path / "c.json")]) == 0
    general = ["evaluate", "--model", str(vision_parts), "--data", str(data), "--device", "cpu", "--no-baselines"]
    assert main([*general, "--out", str(tmp_path / "g"), "--tta", "dihedral"]) == 0
    assert main([*general, "--out", str(tmp_path / "one")]) == 0

    def scores(folder: str) -> list[float]:
        lines = (tmp_path / folder / "predictions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["score"] for line in lines]

    assert scores("v") == pytest.approx(scores("g"), abs=1e-5)
    assert scores("g") != pytest.approx(scores("one"), abs=1e-4)
    said = [json.loads((tmp_path / name / "metrics.json").read_text("utf-8"))["run"]["tta"] for name in "vg"]
    assert said == ["dihedral", "dihedral"]


def test_a_folder_begun_before_there_was_a_choice_is_gone_on_with(tmp_path: Path) -> None:
    """Its run.json has no `tta`; with copies it is another run."""
    (tmp_path / "c.json").write_text(json.dumps({"head_checkpoint": "h"}), encoding="utf-8")
    plain = load_vision_config(tmp_path / "c.json", [], VisionInferenceConfig)
    assert "tta" not in influential(plain)
    flips = load_vision_config(tmp_path / "c.json", ["tta=flips"], VisionInferenceConfig)
    assert influential(flips) == {**influential(plain), "tta": "flips"}


def test_unknown_augmentation_in_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(
        json.dumps({"head_checkpoint": "h", "ann_eval": "a", "inference_output": "o", "tta": "flip"}), encoding="utf-8"
    )
    assert main(["vision", "evaluate", "--config", str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err
    assert "tta" in error
    assert "dihedral" in error
