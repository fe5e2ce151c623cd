"""The generated set: same bytes for any number of workers, nothing half written, and nothing outside the pixels that
tells the label."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from finetune.cli import main
from finetune.data.chat import conversation
from finetune.data.masks import rasterize_polygons
from finetune.data.readers import read_records
from finetune.data.synthesis import SynthConfig, generator, synthesize
from finetune.data.synthesis.photos import find_photos
from finetune.data.synthesis.samples import SampleTask, make_sample, plan_tasks
from finetune.data.template import load_template
from finetune.errors import ConfigError, DataFormatError, ForensicsError
from finetune.special_tokens import SpecialTokens

LEAK = 0.12
"""Largest distance of a one-feature AUROC from 0.5 on the 240 samples; the standard error of chance is 0.037."""


def read(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synth") / "set"
    synthesize(
        SynthConfig(num_val=0, num_train=240, num_eval=40, seed=7, language="both", workers=1), root, progress=False
    )
    return root


def test_records_are_complete_and_consistent(data_set: Path) -> None:
    manifest = json.loads((data_set / "manifest.json").read_text(encoding="utf-8"))
    for split, count in (("train", 240), ("eval", 40)):
        records = read(data_set, split)
        assert [len(records), manifest["counts"][split]["tampered"]] == [count, count // 2]
        assert manifest["sha256"][f"{split}.jsonl"] == digests(data_set)[f"{split}.jsonl"]
        for record in records:
            image = np.asarray(Image.open(data_set / record["images"][0]))
            height, width = image.shape[:2]
            assert (height, width) in {(224, 224), (196, 252), (252, 196)}
            if record["labels"] == [0]:
                assert record["masks"] == [f"{height}x{width}"]
                assert record["polygons"] == [[]]
                assert record["provenance"]["operation"] is None
                continue
            mask = np.asarray(Image.open(data_set / record["masks"][0])) > 0
            assert mask.shape == (height, width)
            drawn = rasterize_polygons(record["polygons"][0], mask.shape)
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.6, record["id"]
            assert sum(map(len, record["polygons"][0])) <= 24
        tampered = [record for record in records if record["labels"] == [1]]
        assert {record["provenance"]["operation"]["name"] for record in tampered} == {
            name for name, weight in SynthConfig().operations.items() if weight
        }


@pytest.mark.parametrize("template", ["zh", "en"])
def test_with_both_languages_question_and_evidence_agree(data_set: Path, template: str) -> None:
    def is_chinese(text: str) -> bool:
        return any("\u4e00" <= letter <= "\u9fff" for letter in text)

    seen = set()
    for record in read_records(data_set / "train.jsonl"):
        question, answer = conversation(record, load_template(template), SpecialTokens(), "tokens_first")
        language = record.provenance["language"]
        assert (is_chinese(question.content), is_chinese(answer.content)) == (language == "zh", language == "zh")
        seen.add(language)
    assert seen == {"zh", "en"}


def test_polygons_cover_the_masks(data_set: Path) -> None:
    overlaps = []
    for record in read(data_set, "train"):
        if record["labels"] == [1]:
            mask = np.asarray(Image.open(data_set / record["masks"][0])) > 0
            drawn = rasterize_polygons(record["polygons"][0], mask.shape)
            overlaps.append((drawn & mask).sum() / (drawn | mask).sum())
    assert np.mean(overlaps) > 0.9
    assert np.mean(np.array(overlaps) > 0.8) > 0.95


def test_annotation_list_is_part_b_of_the_format(data_set: Path) -> None:
    annotations = json.loads((data_set / "eval_annotations.json").read_text(encoding="utf-8"))
    assert len(annotations) == 40
    for item in annotations:
        assert set(item) == {"image_path", "mask_path", "label"}
        assert (data_set / item["image_path"]).is_file()
        assert (data_set / item["mask_path"]).is_file() == (item["label"] == 1)


def test_photographs_are_disjoint_between_splits_donors_included(data_set: Path) -> None:
    used: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        used[split] = set()
        for record in read(data_set, split):
            provenance = record["provenance"]
            used[split].add(provenance["source"]["photo"])
            operation = provenance["operation"]
            if operation and operation["name"] == "splice":
                used[split].add(operation["donor"]["photo"])
                assert operation["donor"]["photo"] != provenance["source"]["photo"]
                assert operation["donor"]["monochrome"] == provenance["source"]["monochrome"]
    assert not used["train"] & used["eval"]


def leak_features(root: Path, record: dict[str, Any]) -> dict[str, float]:
    """Everything about a sample that must not tell its label, as numbers."""
    path = root / record["images"][0]
    image = Image.open(path)
    source, plan = record["provenance"]["source"], record["provenance"]["degradations"]
    features = {
        "bytes": path.stat().st_size,
        "height": image.height,
        "width": image.width,
        "metadata": len(image.info) + len(image.getexif()),
        "extension": len(path.suffix),
        "channels": len(image.getbands()),
        "index": int(record["id"].split("-")[1]),
        "mean": float(np.asarray(image).mean()),
        "degradations": len(plan),
        "quality": next((step["quality"] for step in plan if "quality" in step), 101),
        "camera_jpeg": source["jpeg_quality"] or 101,
        "camera_noise": source["noise_a"] * 128 + source["noise_b"],
        "scale": source["scale"],
        "monochrome": source["monochrome"],
    }
    for name in ("jpeg", "double_jpeg", "webp", "resize", "noise", "contrast"):
        features[f"has_{name}"] = any(step["name"] == name for step in plan)
    return {name: float(value) for name, value in features.items()}


def test_no_single_feature_outside_the_content_tells_the_label(data_set: Path) -> None:
    records = read(data_set, "train")
    labels = [record["labels"][0] for record in records]
    rows = [leak_features(data_set, record) for record in records]
    scores = {name: roc_auc_score(labels, [row[name] for row in rows]) for name in rows[0]}
    for name in ("metadata", "extension", "channels"):
        assert scores[name] == 0.5, f"{name} must be the same for every image"
    leaking = {name: round(score, 3) for name, score in scores.items() if abs(score - 0.5) > LEAK}
    assert not leaking


def test_the_label_changes_nothing_but_the_edit() -> None:
    """The strongest statement about leaks: one task, authentic and tampered, differs in the operation alone."""
    config, photos = SynthConfig(num_val=0, num_train=60, num_eval=0, seed=3), find_photos()
    for task in plan_tasks(config, "train")[:30]:
        real, fake = (
            make_sample(SampleTask("train", task.index, name), config, photos)
            for name in (None, task.operation or "splice")
        )
        assert np.array_equal(real.host, fake.host)
        assert real.image.shape == fake.image.shape
        assert {**real.provenance, "operation": 0} == {**fake.provenance, "operation": 0}
        assert fake.edited_mask is not None
        changed = (fake.host != fake.edited).any(axis=2)
        assert not (changed & ~fake.edited_mask).any()


def test_training_images_come_in_pairs_of_one_picture(data_set: Path) -> None:
    records = read(data_set, "train")
    pairs: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        pairs.setdefault(record["provenance"]["pair"], []).append(record)
    assert len(pairs) == len(records) / 2
    for pair in pairs.values():
        assert sorted(record["labels"][0] for record in pair) == [0, 1]
        assert pair[0]["group"] == pair[1]["group"]
        for name in ("source", "degradations", "seed"):
            assert pair[0]["provenance"][name] == pair[1]["provenance"][name]
        images = [np.asarray(Image.open(data_set / record["images"][0])) for record in pair]
        assert images[0].shape == images[1].shape
        assert not np.array_equal(images[0], images[1])
    leading = np.mean([pair[0]["labels"][0] for pair in pairs.values()])
    assert 0.35 < leading < 0.65  # 120 pairs: standard error 0.046
    assert all("pair" not in record["provenance"] for record in read(data_set, "eval"))


def test_pairs_leave_the_other_splits_alone_and_cover_the_smaller_class(tmp_path: Path) -> None:
    config = SynthConfig(num_val=6, num_train=20, num_eval=6, seed=5, tampered_fraction=0.3, workers=1)
    for name, paired in (("on", True), ("off", False)):
        synthesize(replace(config, paired=paired), tmp_path / name, progress=False)
    on, off = digests(tmp_path / "on"), digests(tmp_path / "off")
    same = {name for name in on if off.get(name) == on[name]}
    assert {name for name in on if name.startswith(("val", "eval"))} <= same
    assert "train.jsonl" not in same
    records = read(tmp_path / "on", "train")
    assert sum("pair" in record["provenance"] for record in records) == 12
    assert [record["labels"] for record in records] == [record["labels"] for record in read(tmp_path / "off", "train")]
    assert not any("pair" in record["provenance"] for record in read(tmp_path / "off", "train"))
    seeds = {record["provenance"]["seed"][2] for record in records}
    assert len(seeds) == 14  # 6 pairs, 8 images of their own


def test_varied_scenes_are_shared_by_a_pair_and_stay_in_training(tmp_path: Path) -> None:
    config = SynthConfig(num_val=4, num_train=16, num_eval=4, seed=5, workers=1)
    for name, share in (("off", 0.0), ("on", 1.0)):
        synthesize(replace(config, scene_variation=share), tmp_path / name, progress=False)
    on, off = digests(tmp_path / "on"), digests(tmp_path / "off")
    assert all(on[name] == off[name] for name in on if name.startswith(("val", "eval")))
    assert not {name for name in on if name.startswith("train/images") and on[name] == off[name]}
    scenes: dict[str, set[str]] = {}
    for record in read(tmp_path / "on", "train"):
        source = record["provenance"]["source"]
        scenes.setdefault(record["provenance"]["pair"], set()).add(str(source["scene"]))
    assert all(len(names) == 1 for names in scenes.values())


def test_further_edits_are_in_mask_and_evidence_and_stay_in_training(tmp_path: Path) -> None:
    config = SynthConfig(num_val=4, num_train=24, num_eval=4, seed=5, workers=1, sizes_hw=((112, 140),))
    for name, share in (("off", 0.0), ("on", 1.0)):
        synthesize(replace(config, further_edits=share), tmp_path / name, progress=False)
    on, off = digests(tmp_path / "on"), digests(tmp_path / "off")
    assert all(on[name] == off[name] for name in on if name.startswith(("val", "eval")))
    several = 0
    for more, less in zip(read(tmp_path / "on", "train"), read(tmp_path / "off", "train"), strict=True):
        further = more["provenance"].pop("further_operations", [])
        image = more["images"][0]
        assert (on[image] == off[image]) == (not further)  # authentic pictures and those without a second place
        assert more["provenance"] == less["provenance"]
        assert len(more["evidence"][0].split("。另外，")) == 1 + len(further)
        if further:
            several += 1
            first, both = (Image.open(tmp_path / name / more["masks"][0]) for name in ("off", "on"))
            assert (first.mode, both.mode) == ("L", "P")
            alone, numbers = np.asarray(first), np.asarray(both)  # 0 and 255; of a palette, which edit
            assert not ((alone > 0) & (numbers == 0)).any()
            assert (numbers[alone == 0] > 0).any()
            assert (numbers > 0).mean() <= 0.46
            assert set(np.unique(numbers)) == set(range(2 + len(further)))
            for number, edit in enumerate((more["provenance"]["operation"], *further), start=1):
                assert (numbers == number).mean() >= 0.5 * edit["area"]
            assert all({"name", "area", "region", "difficulty"} <= set(edit) for edit in further)
    assert several > 6


def test_further_edits_change_nothing_outside_the_mask() -> None:
    config, photos = SynthConfig(num_val=0, num_train=24, num_eval=0, seed=3, further_edits=1.0), find_photos()
    counts = set()
    for task in plan_tasks(config, "train"):
        if task.operation is not None:
            sample = make_sample(task, config, photos)
            assert sample.edited_mask is not None
            assert not ((sample.host != sample.edited).any(axis=2) & ~sample.edited_mask).any()
            counts.add(len(sample.edits))
            assert len(sample.edits) == 1 or sample.edited_mask.mean() <= 0.45
            for place, edit in enumerate(sample.edits):
                for later in sample.edits[place + 1 :]:
                    assert (edit.canvas_mask & later.canvas_mask).sum() <= 0.3 * edit.canvas_mask.sum()
    assert counts <= {1, 2, 3}
    assert {2, 3} <= counts
    with pytest.raises(ConfigError, match="further_edits"):
        SynthConfig(further_edits=0.5, record_kinds={"multi_turn": 0.5})


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_same_bytes_for_one_and_two_workers(image_format: str, tmp_path: Path) -> None:
    kinds = {"multi_turn": 0.5, "comparison": 0.5, "multi_image": 0.2, "conclusion_only": 0.2, "paraphrase": 0.5}
    config = SynthConfig(
        num_val=0, num_train=28, num_eval=6, seed=2, sizes_hw=((112, 140),), language="both", record_kinds=kinds
    )
    config = replace(config, image_format=image_format)
    for workers in (1, 2):
        synthesize(replace(config, workers=workers), tmp_path / str(workers), progress=False)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_another_seed_gives_another_set(tmp_path: Path) -> None:
    config = SynthConfig(num_val=0, num_train=4, num_eval=2, sizes_hw=((84, 112),), record_kinds={"multi_turn": 1.0})
    for seed in (1, 2):
        synthesize(replace(config, seed=seed, workers=1), tmp_path / str(seed), progress=False)
    one, two = digests(tmp_path / "1"), digests(tmp_path / "2")
    assert not [name for name in one if name.startswith("train") and one[name] == two.get(name)]


def test_the_manifest_holds_the_hashes_of_what_is_there(data_set: Path) -> None:
    manifest = json.loads((data_set / "manifest.json").read_text(encoding="utf-8"))
    found = digests(data_set)
    for split in ("train", "eval", "val"):
        assert manifest["sha256"][f"{split}.jsonl"] == found[f"{split}.jsonl"]
        listed = hashlib.sha256()
        for record in read(data_set, split):
            for name in (record["images"][0], record["masks"][0]):
                listed.update(f"{name} {found[name]}\n".encode() if name in found else b"")
        assert manifest["sha256"][f"{split}/"] == listed.hexdigest()


def test_a_longer_set_keeps_its_hosts(tmp_path: Path) -> None:
    photos = find_photos()
    short, long = (SynthConfig(num_val=0, num_train=count, num_eval=0) for count in (10, 50))
    task = SampleTask("train", 4, "splice")
    assert np.array_equal(make_sample(task, short, photos).image, make_sample(task, long, photos).image)


def test_nothing_is_left_when_generation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "make_sample", fail)
    with pytest.raises(KeyboardInterrupt):
        synthesize(SynthConfig(num_val=0, num_train=4, num_eval=0, workers=1), tmp_path / "set", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_only_generated_sets_are_overwritten(tmp_path: Path) -> None:
    config = SynthConfig(num_val=0, num_train=2, num_eval=0, workers=1)
    target = tmp_path / "set"
    target.mkdir()
    synthesize(config, target, progress=False)  # an empty folder is fine
    with pytest.raises(ForensicsError, match="not empty"):
        synthesize(config, target, progress=False)
    synthesize(config, target, progress=False, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(ForensicsError, match="not a generated set"):
        synthesize(config, mine, progress=False, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_two_user_photos_are_enough_and_paths_stay_out_of_the_files(tmp_path: Path) -> None:
    for photo in find_photos().of("eval")[:2]:
        Image.open(photo.path).save(tmp_path / f"{photo.group}.png")
    config = SynthConfig(
        num_val=0, num_train=12, num_eval=6, photos_dir=str(tmp_path), workers=1, sizes_hw=((112, 140),)
    )
    manifest = synthesize(config, tmp_path / "out" / "set", progress=False)
    assert len(manifest["photos"]) == 2
    for file in ("manifest.json", "train.jsonl", "eval_annotations.json"):
        assert str(tmp_path) not in (tmp_path / "out" / "set" / file).read_text(encoding="utf-8")


def test_photographs_to_train_on_are_seen_in_training_only(tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    rng = np.random.default_rng(0)
    for index in range(30):
        coarse = rng.integers(0, 256, (20, 25, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((200, 160), Image.Resampling.BICUBIC).save(more / f"{index}.png")
    out = tmp_path / "set"
    counts = ["--num-train", "24", "--num-val", "0", "--num-eval", "6", "--workers", "1"]
    assert main(["synth", "--out", str(out), "--train-photos", str(more), *counts, "sizes_hw=[[112, 140]]"]) == 0
    groups = {split: {record["group"] for record in read(out, split)} for split in ("train", "eval")}
    assert any(group.startswith("train_photos/") for group in groups["train"])
    assert not any(group.startswith("train_photos/") for group in groups["eval"])
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["train_photos_dir"] == "more"


def test_an_operation_that_cannot_show_gives_way_to_another_on_the_same_host(tmp_path: Path) -> None:
    """A sky without a cloud: a copy of it on itself shows nothing, a retouch of its tone does."""
    rng = np.random.default_rng(0)
    for index in range(3):
        sky = np.array([110 + 15 * index, 160, 200]) + 2 * rng.standard_normal((300, 400, 1))
        Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8)).save(tmp_path / f"sky{index}.png")
    weights = {"copy_move": 0.5, "retouch": 0.5}
    config = SynthConfig(
        num_val=0, num_train=24, num_eval=0, photos_dir=str(tmp_path), workers=1, operations=weights, seed=1
    )
    manifest = synthesize(config, tmp_path / "set", progress=False)
    operations = [r["provenance"]["operation"] for r in read(tmp_path / "set", "train") if r["labels"] == [1]]
    replaced = [operation for operation in operations if "instead_of" in operation]
    assert replaced
    assert all((each["name"], each["instead_of"]) == ("retouch", "copy_move") for each in replaced)
    assert all(operation["visible_share"] >= 0.5 for operation in operations)
    assert manifest["counts"]["train"]["operations"].get("retouch", 0) == 6 + len(replaced)


def test_a_flat_user_photo_is_named(tmp_path: Path) -> None:
    for index in range(2):
        image = np.full((300, 300, 3), 40 * (index + 1), dtype=np.uint8)
        corner = image[:90, :90] if index else image[210:, 210:]
        corner[:] = 255  # bright corner: not one flat colour, but most crops are
        Image.fromarray(image).save(tmp_path / f"flat{index}.png")
    config = SynthConfig(num_val=0,
        num_train=40, num_eval=0, photos_dir=str(tmp_path), workers=1, operations={"retouch": 1},
        operation_settings={"min_change": 25.0},  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(DataFormatError, match=r"train-.*no visible edit.*flat\d\.png"):
        synthesize(config, tmp_path / "set", progress=False)


def test_refused_photographs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for photo in find_photos().of("eval")[:3]:
        Image.open(photo.path).save(tmp_path / f"{photo.group}.png")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    arguments = ["--photos", str(tmp_path), "--num-train", "2", "--num-val", "0", "--num-eval", "1", "--workers", "1"]
    assert main(["synth", "--out", str(tmp_path / "out" / "set"), *arguments]) == 0
    assert "left out broken.jpg: " in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "set" / "manifest.json").read_text(encoding="utf-8"))
    assert [item["name"] for item in manifest["rejected_photos"]] == ["broken.jpg"]


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, finetune.data.synthesis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
