"""From label folders to conversations: nothing lost in silence, no scene in two splits, no help from geometry."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.cli import main
from finetune.data.audit.leaks import auroc_interval, combined_scores
from finetune.data.readers import scan_records
from finetune.data.regions.build import build_sft
from finetune.data.regions.candidates import MAX_OVERLAP, deal_candidates, overlap, whole
from finetune.data.regions.geometry import FEATURES, geometry_aurocs
from finetune.data.regions.labels import LabelledBox
from finetune.data.regions.prepare import prepare_regions
from finetune.data.regions.scan import scan
from finetune.data.regions.settings import SPLITS, RegionsConfig, load_regions_config
from finetune.data.regions.survey import RegionImage
from finetune.data.regions.text import expand_regions, record_regions, region_text, resized_box
from finetune.data.regions.wording import load_region_template, parse_answer
from finetune.data.synthesis.surface_defects import write_surface_samples
from finetune.errors import ConfigError, DataFormatError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surfaces")
    assert write_surface_samples(folder, scenes=10, per_scene=1, side=96)[::2] == (10, 10)
    return folder


@pytest.fixture
def config(raw: Path, tmp_path: Path) -> RegionsConfig:
    return RegionsConfig(str(raw / "abnormal"), str(raw / "normal"), str(tmp_path / "out"), 0, 0.5, 0.25, 0.25)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def labelled_set(num: int, seed: int, *, off_center: bool) -> list[RegionImage]:
    """Images of several sizes; boxes of a narrow range of sizes at places of their own."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(num):
        size_hw = (480, 640) if index % 2 else (600, 600)
        image = RegionImage(f"abnormal/{index}", "x.jpg", f"g{index % 20}", size_hw)
        for _ in range(int(rng.integers(1, 4))):
            w, h = rng.uniform(0.1, 0.3), rng.uniform(0.08, 0.18)
            x, y = rng.beta(2, 5 if off_center else 2) * (1 - w), rng.beta(2, 2) * (1 - h)
            box = (x * size_hw[1], y * size_hw[0], (x + w) * size_hw[1], (y + h) * size_hw[0])
            if all(overlap(box, other.box_xyxy) < 0.05 for other in image.boxes):
                image.boxes.append(LabelledBox(box, "crack", f"{index}.txt:1"))
        images.append(image)
        images.append(RegionImage(f"normal/{index}", "y.jpg", f"g{index % 20}", size_hw))
    return images


@pytest.mark.parametrize("off_center", [False, True])
def test_size_aspect_and_place_alone_give_nothing_away(off_center: bool) -> None:
    images = labelled_set(400, 3, off_center=off_center)
    dealt = deal_candidates(images, RegionsConfig(), np.random.default_rng(0))
    sizes = {image.id: image.size_hw for image in images}
    for name, value in geometry_aurocs(dealt.candidates, sizes).items():
        if name != "candidates":  # normal images have as many, but nothing positive among them
            assert value == pytest.approx(0.5, abs=0.04), name
    other = deal_candidates(labelled_set(400, 4, off_center=off_center), RegionsConfig(), np.random.default_rng(1))
    rows, labels, splits, groups = [], [], [], []
    for split, each in enumerate((dealt, other)):  # learned on one split, asked on another, as a model is
        for number, (image, regions) in enumerate(each.candidates.items()):
            for region in regions:
                x1, y1, x2, y2 = (v / s for v, s in zip(region.box_xyxy, sizes[image][::-1] * 2, strict=True))
                rows.append((x1, y1, x2, y2, x2 - x1, y2 - y1, *(corner % 1 for corner in region.box_xyxy)))
                labels.append(int(region.defect_type is not None))
                splits.append(split)
                groups.append(number)
    truth = np.array(labels)
    scores = combined_scores(np.array(rows), np.zeros((len(rows), 0), dtype=int), truth, np.array(splits))
    for split in (0, 1):
        chosen = np.array(splits) == split
        found = auroc_interval(scores[chosen], truth[chosen], np.array(groups)[chosen])
        assert found.auroc == pytest.approx(0.5, abs=0.08)
    by_kind = {kind: [len(r) for i, r in dealt.candidates.items() if i.startswith(kind)] for kind in ("abn", "nor")}
    assert np.mean(by_kind["abn"]) == pytest.approx(np.mean(by_kind["nor"]), rel=0.15)


def test_boxes_of_another_distribution_would_be_noticed() -> None:
    images = labelled_set(60, 1, off_center=True)
    dealt = deal_candidates(images, RegionsConfig(), np.random.default_rng(0))
    wide = {
        name: [
            r if r.defect_type else replace(r, box_xyxy=(*r.box_xyxy[:2], r.box_xyxy[2] + 60, r.box_xyxy[3]))
            for r in regions
        ]
        for name, regions in dealt.candidates.items()
    }
    found = geometry_aurocs(wide, {image.id: image.size_hw for image in images})
    assert set(found) == set(FEATURES)
    assert found["width"] is not None
    assert found["width"] < 0.35


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cap=st.integers(1, 8),
    ratio=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    decoys=st.sampled_from((0, 3, "match")),
)
def test_candidates_respect_every_limit(seed: int, cap: int, ratio: float, decoys: int | str) -> None:
    images = labelled_set(6, seed, off_center=False)
    config = RegionsConfig(max_boxes_per_image=cap, abnormal_neg_per_pos=ratio, normal_decoys_per_image=decoys)  # type: ignore[arg-type]
    dealt = deal_candidates(images, config, np.random.default_rng(seed))
    kept = 0
    for image in images:
        regions = dealt.candidates.get(image.id, [])
        assert len(regions) <= cap
        assert [region.id for region in regions] == [f"R{i}" for i in range(1, len(regions) + 1)]
        labelled = [whole(box.box_xyxy) for box in image.boxes]
        positive = [region for region in regions if region.defect_type]
        kept += len(positive)
        assert all(region.box_xyxy in labelled for region in positive)
        others = [region.box_xyxy for region in regions if not region.defect_type]
        for index, box in enumerate(others):
            assert all(overlap(box, other) <= MAX_OVERLAP for other in labelled + others[:index])
            assert 0 <= box[0] < box[2] <= image.size_hw[1]
            assert 0 <= box[1] < box[3] <= image.size_hw[0]
    assert kept + dealt.dropped == sum(len(image.boxes) for image in images)
    assert set(dealt.unused) | set(dealt.candidates) == {image.id for image in images}


def test_folders_are_never_divided_and_the_hold_out_list_is_forced_into_test(
    config: RegionsConfig, tmp_path: Path
) -> None:
    held = tmp_path / "holdout.txt"
    held.write_text("# scenes\nscene_03\nabnormal/scene_07/00.jpg\n", encoding="utf-8")
    done = prepare_regions(replace(config, holdout_list=str(held)))
    groups = {
        split: {line["group"] for line in lines(Path(config.out_dir) / f"candidates_{split}.jsonl")}
        for split in ("train", "val", "test")
    }
    assert {"scene_03", "scene_07"} <= groups["test"]
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["val"] | groups["val"] & groups["test"]
    assert set().union(*groups.values()) == {f"scene_{i:02d}" for i in range(10)}
    first = (Path(config.out_dir) / "candidates_train.jsonl").read_bytes()
    prepare_regions(replace(config, holdout_list=str(held)))
    assert (Path(config.out_dir) / "candidates_train.jsonl").read_bytes() == first
    assert done.rejected == 0


def test_without_folders_as_scenes_every_image_is_a_group_of_its_own(config: RegionsConfig) -> None:
    done = prepare_regions(replace(config, split_by_parent=False))
    written = [line for split in SPLITS for line in lines(Path(config.out_dir) / f"candidates_{split}.jsonl")]
    assert {line["group"] for line in written} == {""}  # else an evaluation takes two splits for one scene
    assert sum(facts["groups"] for facts in done.report["splits"].values()) == len(written) == 20


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("工地一/\n", "gbk"), ("raw\\abnormal\\工地一\\\r\n", "utf-16"), ("工地一/00.jpg", "utf-8-sig")],
)
def test_a_hold_out_list_as_it_is_saved_on_windows(tmp_path: Path, text: str, encoding: str) -> None:
    folder = tmp_path / "raw"
    write_surface_samples(folder, scenes=6, per_scene=1, side=96)
    for kind in ("abnormal", "normal"):
        (folder / kind / "scene_00").rename(folder / kind / "工地一")
    (tmp_path / "hold.txt").write_bytes(text.encode(encoding))
    for by_parent in (True, False):
        config = RegionsConfig(str(folder / "abnormal"), str(folder / "normal"), str(tmp_path / "out"), 0, 0.5, 0.5, 0)
        config = replace(config, holdout_list=str(tmp_path / "hold.txt"), split_by_parent=by_parent)
        done = prepare_regions(config)
        held = {line["id"] for line in lines(tmp_path / "out" / "candidates_test.jsonl")}
        both = by_parent or "abnormal" not in text  # a scene is one in both folders; a path is of one of them
        assert held == ({"abnormal/工地一/00", "normal/工地一/00"} if both else {"abnormal/工地一/00"})
        assert not any("hold-out" in warning for warning in done.report["warnings"])


def test_an_image_cut_off_behind_its_header_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_surface_samples(tmp_path / "raw", scenes=6, per_scene=1, side=96)
    for name in ("abnormal/scene_02/00.jpg", "normal/scene_04/00.jpg"):
        path = tmp_path / "raw" / name
        path.write_bytes(path.read_bytes()[:-600])
    given = [f"{kind}_dir={tmp_path / 'raw' / kind}" for kind in ("abnormal", "normal")]
    given = ["regions", "prepare", "--set", *given, f"out_dir={tmp_path / 'out'}"]
    assert main(given) == 1
    told = capsys.readouterr().err
    assert "record 'abnormal/scene_02/00'" in told
    assert told.count("image is truncated or damaged") == 2
    assert main([*given, "--on-error", "skip"]) == 0
    rejected = {line["id"] for line in lines(tmp_path / "out" / "rejected.jsonl")}
    assert rejected == {"abnormal/scene_02/00", "normal/scene_04/00"}


def test_fractions_of_labels_do_not_mark_them() -> None:
    images = labelled_set(30, 5, off_center=False)
    for image in images:
        image.size_hw = (600, 600)
    for regions in deal_candidates(images, RegionsConfig(), np.random.default_rng(0)).candidates.values():
        assert all(corner == int(corner) for region in regions for corner in region.box_xyxy)
    assert whole((0.5, 1.5, 1.5, 2.5)) == (1, 2, 2, 3)  # halves to one side: no box loses its only pixel


def test_labelled_boxes_that_overlap_are_warned_of(tmp_path: Path) -> None:
    for name, second in (("a", "12,12,42,42"), ("b", "60,60,90,90"), ("c", "15,15,45,45")):
        folder = tmp_path / "abnormal" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (100, 100)).save(folder / "0.jpg")
        (folder / "0.txt").write_text(f"0.jpg;10,10,40,40;x\n0.jpg;{second};x", encoding="utf-8")
    config = RegionsConfig(
        str(tmp_path / "abnormal"), out_dir=str(tmp_path / "out"), train_ratio=1, val_ratio=0, test_ratio=0
    )
    done = prepare_regions(config)
    assert done.report["splits"]["train"]["overlapping_positives"] == 4
    assert any("4 of 6 labelled boxes overlap another" in warning for warning in done.report["warnings"])


def test_every_bad_file_is_named_and_left_out_whole_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_surface_samples(tmp_path / "raw", scenes=6, per_scene=1, side=96)
    abnormal = tmp_path / "raw" / "abnormal"
    (abnormal / "scene_00" / "00.txt").write_text(
        "00.jpg;1,2,3x,40;裂缝\n00.jpg;1,2,40,50;未知类型\n", encoding="utf-8"
    )
    (abnormal / "scene_01" / "00.txt").unlink()
    (abnormal / "scene_02" / "extra.txt").write_text("extra.jpg;1,2,30,40;裂缝\n", encoding="utf-8")
    (abnormal / "scene_03" / "00.jpg").write_bytes(b"")
    (tmp_path / "raw" / "normal" / "scene_04" / "00.txt").write_text("x", encoding="utf-8")
    yaml = str(ROOT / "configs" / "data" / "regions.yaml")
    given = ["--set", f"abnormal_dir={abnormal}", f"normal_dir={tmp_path}/raw/normal", f"out_dir={tmp_path}/out"]
    assert main(["regions", "prepare", "--config", yaml, *given]) == 1
    said = capsys.readouterr().err
    for part in (
        "(scene_00/00.txt:1): not a number; field 'coords'; found '3x'",
        "(scene_00/00.txt:2): defect type not in label_map; field 'defect_type'; found '未知类型'",
        "(scene_01/00.jpg): image without a label file",
        "(scene_02/extra.txt): label file without an image",
        "record 'abnormal/scene_03/00' (scene_03/00.jpg): ",
        "(scene_04/00.txt): label file in normal_dir",
        "5 of 14 images cannot be used, nothing was written",
    ):
        assert part in said
    assert not (tmp_path / "out").exists()
    assert main(["regions", "prepare", "--config", yaml, *given, "--on-error", "skip"]) == 0
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [line["id"] for line in rejected] == [
        *("abnormal/scene_00/00", "abnormal/scene_01/00", "abnormal/scene_02/extra", "abnormal/scene_03/00"),
        "normal/scene_04/00.txt",
    ]
    assert [problem["source"] for problem in rejected[0]["problems"]] == ["scene_00/00.txt:1", "scene_00/00.txt:2"]
    assert main(["regions", "prepare", "--config", yaml, *given, "--on-error", "skip"]) == 2
    assert "give --overwrite" in capsys.readouterr().err


def test_scan_counts_types_and_proposes_a_map(tmp_path: Path) -> None:
    folder = tmp_path / "abnormal"
    folder.mkdir()
    for name, text in (("a", "a.jpg;1,2,30,40 50,50,80,80;裂缝"), ("b", "b.jpg;1,2,30,40;裂 缝\nb.jpg;50,50,80,80;x")):
        Image.new("RGB", (100, 100)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    found = scan(RegionsConfig(str(folder), out_dir=str(tmp_path / "out"), label_map={"other": "other"}))
    assert found.problems == []
    stats = json.loads((tmp_path / "out" / "label_stats.json").read_text(encoding="utf-8"))
    assert stats["types"] == {
        "裂缝": {"boxes": 2, "images": 1, "lines": 1},
        "x": {"boxes": 1, "images": 1, "lines": 1},
        "裂 缝": {"boxes": 1, "images": 1, "lines": 1},
    }
    assert (stats["boxes"], stats["lines"], stats["box_pixels"]["width"]["median"]) == (4, 3, 30)
    assert stats["label_map"] == found.label_map == {"裂缝": "裂缝", "x": "x", "裂 缝": "裂缝"}
    assert "裂 缝: 裂缝" in found.pasteable


def test_a_line_without_a_type_is_a_problem_and_no_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a.jpg;1,2,30,40;\n" * 25 + "a.jpg;1,2,30,40;裂缝", encoding="utf-8")
    given = ["regions", "scan", "--set", f"abnormal_dir={tmp_path}", f"out_dir={tmp_path / 'out'}"]
    assert main(given) == 1
    out, err = capsys.readouterr()
    assert yaml.safe_load(out[out.index("label_map:") :]) == {"label_map": {"裂缝": "裂缝"}}
    assert "no defect type" in err
    assert "not in label_map" not in err
    assert "error: and 5 more; all in label_stats.json" in err


@pytest.mark.parametrize(("template", "language"), [("zh", {"zh"}), ("both", {"zh", "en"})])
def test_built_records_load_and_their_answers_read_back(
    config: RegionsConfig, template: str, language: set[str]
) -> None:
    prepare_regions(config)
    built = build_sft(config.out_dir, template, copy_images=True)
    assert sum(each.records for each in built) == 20
    records, errors = scan_records(built[0].path)
    assert errors == []
    assert {record.provenance["language"] for record in records} == language
    for record in records:
        assert record.images[0].path is not None
        assert record.images[0].path.startswith(config.out_dir)
        regions = record_regions(record)
        assert regions is not None
        ids = [name for name, _ in regions]
        answer = parse_answer(record.turns[-1].content, ids)
        assert answer.is_exact
        assert [name for name in ids if answer.verdicts[name]] == record.provenance["positive_region_ids"]
        user = expand_regions(record, record.turns, [(96, 96)], [(192, 288)])[0].content
        assert user.count("<regions>") == user.count("</regions>") == 1
        name, box = regions[0]
        wanted = [round(box[0] * 3), round(box[1] * 2), round(box[2] * 3), round(box[3] * 2)]
        assert f"\n{name}: {wanted}\n" in user
    with pytest.raises(ConfigError, match="give --overwrite"):
        build_sft(config.out_dir)


def test_boxes_stay_within_the_resized_image() -> None:
    assert resized_box((10, 20, 110, 220), (400, 200), (200, 100)) == (5, 10, 55, 110)
    assert resized_box((199.9, 0, 200, 0.2), (400, 200), (40, 20)) == (19, 0, 20, 1)
    assert resized_box((0, 0, 200, 400), (400, 200), (28, 56)) == (0, 0, 56, 28)
    text = region_text(["R1", "R2"], [(0, 0, 10, 10), (5, 5, 20, 30)], (40, 40), (80, 80))
    assert text == "<regions>\nR1: [0, 0, 20, 20]\nR2: [10, 10, 40, 60]\n</regions>"


@pytest.mark.parametrize(
    "regions",
    [[], "R1", [{"id": "R1"}], [{"id": "R1", "box_xyxy": [3, 3, 1, 9]}], [{"id": 1, "box_xyxy": [0, 0, 1, 1]}]],
)
def test_damaged_regions_of_a_record_are_an_error(config: RegionsConfig, regions: object) -> None:
    prepare_regions(config)
    record = scan_records(build_sft(config.out_dir)[0].path)[0][0]
    with pytest.raises(DataFormatError, match=r"provenance\.regions"):
        record_regions(replace(record, provenance={"regions": regions}))
    assert record_regions(replace(record, provenance={})) is None


def test_answers_that_are_not_exact_give_what_can_be_read() -> None:
    answer = load_region_template("en").answer({"R1": "crack", "R2": None})
    assert json.loads(answer)["verdicts"] == {"R1": "abnormal", "R2": "normal"}
    assert parse_answer(answer, ["R1", "R2"]).is_exact
    found = parse_answer(answer, ["R1", "R2", "R3"])
    assert (found.is_exact, found.verdicts) == (False, {"R1": True, "R2": False})
    assert parse_answer(answer[:-1], ["R1", "R2"]).verdicts == {}
    odd = parse_answer(
        '{"verdicts": {"R1": "maybe"}, "abnormal": [{"id": "R1", "type": "x", "confidence": 7}]}', ["R1"]
    )
    assert (odd.verdicts, odd.findings[0].confidence, odd.is_exact) == ({}, None, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": ["<image> no list"]}, "needs <regions> once"),
        ({"reason": "{kind}"}, r"holds \{kind\}"),
        ({"confidence": 2}, "confidence is 2"),
        ({"extra": 1}, "expected the keys"),
    ],
)
def test_a_template_is_checked(tmp_path: Path, change: dict, message: str) -> None:
    tree = {"questions": ["<image><regions>"], "reason": "{type}", "reasons": {}, "confidence": 0.9, **change}
    (tmp_path / "own.yaml").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_region_template(str(tmp_path / "own.yaml"))
    with pytest.raises(ConfigError, match="not built in"):
        load_region_template("fr")


def test_the_committed_samples_are_those_of_the_documented_command(tmp_path: Path) -> None:
    config = load_regions_config(str(ROOT / "configs" / "data" / "regions.yaml"), [])
    folder = ROOT / Path(config.abnormal_dir).parent
    write_surface_samples(tmp_path, scenes=2, per_scene=2)
    for path in sorted(tmp_path.rglob("*.txt")):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    found = scan(
        replace(
            config,
            **{n: str(ROOT / getattr(config, n)) for n in ("abnormal_dir", "normal_dir")},
            out_dir=str(tmp_path / "out"),
        )
    )
    assert found.problems == found.notes == []
    assert set(found.stats["types"]) == set(config.label_map)
