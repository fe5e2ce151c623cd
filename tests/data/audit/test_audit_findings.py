"""Every finding: a small set that has it and one that has not, through the command as a user runs it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import main
from finetune.data.audit import Audit, AuditSettings, run_audit, write_audit
from finetune.data.audit.facts import stated_class
from finetune.data.audit.features import FEATURES, container_features, content_features, jpeg_quality, name_features
from finetune.data.audit.run import find_sources
from finetune.data.audit.texts import CHECKS, FEATURE_NAMES, advice, title
from finetune.errors import ConfigError
from finetune.schema import ImageInput

MakeSet = Callable[..., Path]


def audit(*paths: Path, **settings: Any) -> Audit:
    return run_audit(find_sources([str(p) for p in paths]), AuditSettings(workers=1, **settings), progress=False)


def found(result: Audit) -> dict[str, Any]:
    """Findings by check, a leak's by check and subject."""
    return {f.check + (f":{f.subject}" if f.check.startswith("leak_") else ""): f for f in result.findings}


def as_jpeg(quality: int, **options: Any) -> Callable[[Image.Image, Path, int], str]:
    def save(image: Image.Image, stem: Path, label: int) -> str:
        image.save(f"{stem}.jpg", quality=quality, **options)
        return f"{stem.name}.jpg"

    return save


def by_class(real: Callable[..., str] | None, fake: Callable[..., str] | None) -> Callable[..., str]:
    def save(image: Image.Image, stem: Path, label: int) -> str:
        chosen = fake if label else real
        if chosen is not None:
            return chosen(image, stem, label)
        image.save(f"{stem}.png")
        return f"{stem.name}.png"

    return save


def question(text: str, answer: str = "ok") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": answer}]}


def test_a_set_saved_alike_has_no_finding(make_set: MakeSet) -> None:
    result = audit(make_set())
    assert found(result) == {}
    assert all(leak.auroc is None or abs(leak.auroc - 0.5) < 0.25 for leak in result.leaks if leak.family != "content")


def test_a_rule_that_names_no_group_is_said(make_set: MakeSet) -> None:
    path = make_set()
    finding = found(audit(path, group_by="path:nomatch_(x)"))["ungrouped"]
    assert (finding.severity, finding.details["rule"]) == ("warning", "path:nomatch_(x)")
    assert finding.count == finding.details["total"] > 0
    assert "gives no group" in title(finding, "en")
    assert "ungrouped" not in found(audit(path, group_by="path:([0-9]+)"))


def test_tampered_jpg_and_authentic_png_exit_1(make_set: MakeSet, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_set(save=by_class(None, as_jpeg(90)))
    assert main(["audit", str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^error: file extension alone gives the label away: AUROC 1\.00 \(0\.75-1\.00\)", out, re.M)
    assert "error: container features together give the label away" in out
    assert main(["audit", str(make_set("alike", save=as_jpeg(90))), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("feature", "real", "fake"),
    [
        ("jpeg_quality", as_jpeg(95), as_jpeg(70)),
        ("jpeg_tables", as_jpeg(95), as_jpeg(70)),
        ("jpeg_subsampling", as_jpeg(90, subsampling=0), as_jpeg(90, subsampling=2)),
        ("jpeg_progressive", as_jpeg(90), as_jpeg(90, progressive=True)),
        ("metadata", as_jpeg(90), as_jpeg(90, dpi=(300, 300))),
        ("file_bytes", as_jpeg(95), as_jpeg(60)),
        ("bytes_per_pixel", as_jpeg(95), as_jpeg(60)),
        ("mode", None, lambda i, s, _: (i.convert("RGBA").save(f"{s}.png"), f"{s.name}.png")[1]),
        ("format", None, as_jpeg(90)),
    ],
)
def test_how_files_are_saved_is_a_leak(
    make_set: MakeSet, feature: str, real: Callable[..., str] | None, fake: Callable[..., str] | None
) -> None:
    finding = found(audit(make_set(save=by_class(real, fake))))[f"leak_container:{feature}"]
    assert finding.severity == "error"
    assert finding.details["low"] > 0.65


def exif(image: Image.Image, stem: Path, label: int) -> str:
    tags = Image.Exif()
    tags[271], tags[272], tags[305] = ("Canon", "EOS 5D", "") if label == 0 else ("", "", "Adobe Photoshop")
    image.save(f"{stem}.jpg", quality=90, exif=tags)
    return f"{stem.name}.jpg"


def test_exif_is_a_leak_by_presence_and_by_field(make_set: MakeSet) -> None:
    one_sided = found(audit(make_set(save=by_class(as_jpeg(90), exif))))
    assert one_sided["leak_container:has_exif"].details["auroc"] == 1
    both = found(audit(make_set("both", save=exif)))
    assert "leak_container:has_exif" not in both
    for field in ("make", "model", "software"):
        assert both[f"leak_container:exif_{field}"].severity == "error"
    assert "Canon 12" in both["leak_container:exif_make"].details["note"]


def test_sizes_names_and_colours_are_leaks_of_their_own_weight(make_set: MakeSet) -> None:
    def save(image: Image.Image, stem: Path, label: int) -> str:
        image = image.resize((128, 96)) if label else image
        dark = Image.fromarray((np.asarray(image) * (0.5 if label else 1)).astype(np.uint8))
        name = f"{'Tp' if label else 'Au'}_{stem.name}.png"
        dark.save(stem.with_name(name))
        return name

    def unmasked(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key != "masks"}

    result = audit(make_set(save=save, record=unmasked))
    seen = found(result)
    assert seen["leak_container:width"].severity == seen["leak_container:size"].severity == "error"
    assert seen["leak_name:name_prefix"].severity == "warning"
    assert seen["leak_content:mean_red"].severity == "warning"
    assert [f.severity for f in result.findings] == sorted(
        (f.severity for f in result.findings), key="error warning info".find
    )
    assert seen["mask_missing"].count == 12


def test_a_threshold_decides(make_set: MakeSet) -> None:
    path = make_set(save=by_class(None, as_jpeg(90)))
    assert "leak_container:format" not in found(audit(path, leak_threshold=0.8))  # 12 groups prove 0.75 at most


def test_prompts_that_differ_by_class(make_set: MakeSet) -> None:
    def ask(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        return fields | question("Which part was edited?" if label else "Is this a photo?")

    finding = found(audit(make_set(record=ask)))["leak_prompt:prompt"]
    assert finding.severity == "error"
    assert "12 of 12 tampered" in finding.details["note"]

    def alike(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        return fields | question(["Is this a photo?", "Which part was edited?"][pair % 2])

    assert found(audit(make_set("alike", record=alike))) == {}


def test_the_place_in_a_comparison_is_a_clue(make_set: MakeSet, tmp_path: Path) -> None:
    path = make_set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [
        {"id": f"c{k}", "group": a["group"], **{key: [*a[key], *b[key]] for key in ("images", "labels", "masks")}}
        | {"messages": [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "ok"}]}
        for k, (a, b) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))
    assert "leak_prompt:prompt" in found(audit(path))
    for pair in pairs[::2]:
        for key in ("images", "labels", "masks"):
            pair[key].reverse()
    path.write_text("\n".join(map(json.dumps, pairs)))
    assert "leak_prompt:prompt" not in found(audit(path))


def test_copies_across_splits(make_set: MakeSet) -> None:
    train, test = make_set("train"), make_set("test", first=10, save=as_jpeg(80), record=_other_group)
    seen = found(audit(train, test))
    assert seen["overlap_picture"].count >= 2  # photographs 10 and 11, saved differently
    assert "train/data: " in seen["overlap_picture"].examples[0].note
    assert "overlap_group" not in seen
    same = found(audit(train, make_set("copy", first=11, pairs=12)))
    assert same["overlap_group"].count == 1
    assert same["overlap_bytes"].count == 2
    assert {f.severity for k, f in same.items() if k.startswith("overlap")} == {"error"}
    apart = audit(train, make_set("apart", first=50, record=_other_group))
    assert not [check for check in found(apart) if check.startswith("overlap")]


def _other_group(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
    return fields | {"group": f"other_{pair}"}


def test_copies_inside_a_split_are_information_and_contradictions_errors(make_set: MakeSet) -> None:
    path = make_set()
    row = json.loads(path.read_text().splitlines()[0])
    again = {**row, "id": "again"}
    seen = found(audit(make_set(extra=[again])))
    assert seen["copies_inside"].severity == "info"
    assert "contradiction" not in seen
    torn = found(audit(make_set(extra=[{**row, "id": "torn", "labels": [1], "masks": [None]}])))
    assert torn["contradiction"].severity == "error"
    assert {example.note for example in torn["contradiction"].examples} == {"label 0", "label 1"}


def test_bad_files_and_rows(make_set: MakeSet, tmp_path: Path) -> None:
    path = make_set()
    folder = path.parent
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    Image.new("L", (10, 10), 255).save(folder / "small.png")
    Image.new("L", (96, 72), 0).save(folder / "black.png")
    Image.open(folder / "00000.png").save(folder / "really.jpg", format="PNG")
    extra = [
        {"id": "empty", "images": ["empty.png"], "labels": [0]},
        {"id": "cut", "images": ["cut.jpg"], "labels": [0]},
        {"id": "gone", "images": ["gone.jpg"], "labels": [0]},
        {"id": "size", "images": ["00002.png"], "labels": [1], "masks": ["small.png"]},
        {"id": "black", "images": ["00003.png"], "labels": [1], "masks": ["black.png"]},
        {"id": "named", "images": ["really.jpg"], "labels": [0]},
        {"id": "token", "images": ["00004.png"], "labels": [0], **question("?", "<mask_40>")},
        {"id": "label", "images": ["00005.png"], "labels": [2]},
    ]
    result = audit(make_set(extra=extra))
    seen = found(result)
    assert {check: [e.record for e in seen[check].examples] for check in (
        "unreadable", "mask_size", "mask", "wrong_extension", "conversation", "unreadable_record"
    )} == {
        "unreadable": ["empty", "cut", "gone"], "mask_size": ["size"], "mask": ["black"],
        "wrong_extension": ["named"], "conversation": ["token"], "unreadable_record": ["label"],
    }  # fmt: skip
    assert seen["unreadable"].count == 3
    assert "image file not found" in seen["unreadable"].examples[2].note
    assert result.counts["unreadable_records"] == 1


def test_masks_of_next_to_nothing_and_of_nearly_everything(make_set: MakeSet) -> None:
    make_set()
    folder = make_set().parent
    for name, filled in (("speck", 4), ("whole", 71 * 96)):
        values = np.zeros(72 * 96, np.uint8)
        values[:filled] = 255
        Image.fromarray(values.reshape(72, 96)).save(folder / f"{name}.png")
    extra = [{"id": n, "images": [f"{n}_i.png"], "labels": [1], "masks": [f"{n}.png"]} for n in ("speck", "whole")]
    for k, name in enumerate(("speck", "whole")):
        Image.open(folder / f"0000{k}.png").rotate(180).save(folder / f"{name}_i.png")
    result = audit(make_set(extra=extra))
    seen = found(result)
    assert (seen["mask_tiny"].count, seen["mask_tiny"].examples[0].note) == (1, "0.058%")
    assert [example.record for example in seen["mask_whole"].examples] == ["whole"]
    area = result.counts["mask_area"]
    assert (area["images"][0], area["images"][-1], sum(area["images"])) == (1, 1, 14)


def test_balance_of_classes(make_set: MakeSet) -> None:
    path = make_set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    reals, fakes = ([row for row in rows if row["labels"] == [label]] for label in (0, 1))

    def of(*kept: dict[str, Any]) -> dict[str, Any]:
        path.write_text("\n".join(map(json.dumps, kept)))
        return found(audit(path))

    assert title(of(*reals)["one_class"]) == "only one class: all 12 labelled images are real"
    rare = of(*reals, *fakes[:1])
    assert title(rare["imbalance"]) == "rare class: 7.7% of the images (1) are tampered"
    assert rare["leaks_not_judged"].severity == "info"
    assert "no_labels" in of(*[{**row, "labels": [None], "masks": [None]} | question("?") for row in rows])
    train = make_set("train2", first=30)
    path.write_text("\n".join(map(json.dumps, reals)))
    lacking = found(audit(train, path))["split_lacks_class"]
    assert title(lacking).endswith("has no tampered image")


def test_groups_of_one_class_are_named(make_set: MakeSet) -> None:
    def folders(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        return fields | {"group": ("authentic", "tampered")[label]}

    seen = found(audit(make_set(record=folders, save=by_class(None, as_jpeg(90)))))
    assert seen["groups_of_one_class"].severity == "warning"
    assert seen["leak_container:format"].severity == "error"  # judged on unseen images instead


def test_questions_and_answers_that_tell(make_set: MakeSet) -> None:
    def tell(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        said = "This picture is fake. Say where." if label else "This picture is real. Say why."
        return fields | question(said, "fake <cls>" if label else "<cls>")

    seen = found(audit(make_set(record=tell), num_mask=4))
    assert seen["verdict_in_question"].count == 24
    assert seen["late_tokens"].count == 12

    def name(fields: dict[str, Any], label: int, pair: int) -> dict[str, Any]:
        return fields | question(f"look at {fields['images'][0]}")

    assert found(audit(make_set("named", record=name)))["file_name_in_question"].count == 24


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This image is fake.", 1),
        ("这是一张伪造图像。说明依据", 1),
        ("该图为真实图像。", 0),
        ("This photo is untampered.", 0),
        ("图像未经篡改。", 0),
        ("Is this image fake?", None),
        ("这张证件照是否存在PS痕迹", None),
        ("请分析下面这张图片的真伪, 用json格式输出", None),
        ("Is it real or fake? Mark the tampered region", 1),
        ("Decide between real and fake.", None),
        ("", None),
    ],
)
def test_what_a_question_states(text: str, expected: int | None) -> None:
    assert stated_class(text) == expected


def test_too_long_records_need_a_model(
    make_set: MakeSet, tiny_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = make_set(pairs=6, record=lambda f, label, pair: f | question("word " * (60 if pair == 3 else 1)))
    command = ["audit", str(path), "--model", str(tiny_dir), "--workers", "1", "--max-length"]
    assert main([*command, "5000", "--out", str(tmp_path / "out")]) == 0
    tokens = json.loads((tmp_path / "out" / "audit.json").read_text())["counts"]["tokens"]
    assert 20 < tokens["min"] <= tokens["median"] < tokens["max"] < 5000
    capsys.readouterr()
    assert main([*command, str(tokens["max"] - 1)]) == 1
    out = capsys.readouterr().out
    assert f"error: records of more than {tokens['max'] - 1} tokens: 2 (longest {tokens['max']})" in out
    assert main(["audit", str(path), "--max-length", "9"]) == 2
    assert "--max-length needs --config" in capsys.readouterr().err


def test_our_own_synthetic_set_passes(tmp_path: Path) -> None:
    out = tmp_path / "synth"
    made = ["synth", "--out", str(out), "--num-train", "40", "--num-val", "2", "--num-eval", "20", "--workers", "1"]
    assert main(made) == 0
    assert main(["audit", str(out / "train.jsonl"), str(out / "eval.jsonl"), "--workers", "1"]) == 0
    seen = found(audit(out / "train.jsonl", out / "eval.jsonl"))
    assert {finding.severity for finding in seen.values()} <= {"info", "warning"}


def test_the_page_and_the_json(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set(save=by_class(None, as_jpeg(90))).parent
    Image.new("L", (10, 10), 255).save(folder / "small.png")
    wrong = {"id": "size", "images": ["00000.png"], "labels": [1], "masks": ["small.png"]}
    path = make_set(save=by_class(None, as_jpeg(90)), record=lambda f, *_: f | {"id": f"<b>{f['id']}"}, extra=[wrong])
    sources = find_sources([str(path)])
    result = run_audit(sources, AuditSettings(workers=1), progress=False)
    write_audit(result, sources, tmp_path / "out")
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 2
    assert "&lt;b&gt;train-00000" in page
    assert "<b>train" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page
    assert "仅凭扩展名即可判断标签" in page
    told = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert told["errors"] == result.num_errors > 0
    assert {"check", "severity", "count", "examples", "title", "title_zh", "advice"} <= set(told["findings"][0])
    assert told["counts"]["splits"]["data"]["real"] == 12


@pytest.mark.parametrize(
    ("real", "fake", "clue"),
    [
        (None, as_jpeg(90), "leak_container:extension"),
        (as_jpeg(90), exif, "leak_container:has_exif"),
        (as_jpeg(95), as_jpeg(70), "leak_container:jpeg_tables"),
    ],
)
def test_a_clue_in_the_container_is_shown_with_pictures_of_both_classes(
    make_set: MakeSet, tmp_path: Path, real: Callable[..., str] | None, fake: Callable[..., str], clue: str
) -> None:
    sources = find_sources([str(make_set(save=by_class(real, fake)))])
    result = run_audit(sources, AuditSettings(workers=1), progress=False)
    finding = found(result)[clue]
    values = [example.note for example in finding.examples]
    assert len(values) == 4
    assert values[0] == values[1] != values[2] == values[3]  # what is usual in each class
    write_audit(result, sources, tmp_path / "out")
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    (article,) = (part for part in page.split("<article")[1:] if title(finding) in html.unescape(part))
    assert article.count("data:image/jpeg;base64,") == 4
    assert article.count("真实") >= 2
    assert article.count("伪造") >= 2


def test_the_result_does_not_depend_on_the_number_of_workers(make_set: MakeSet) -> None:
    path = make_set(pairs=40, save=by_class(None, as_jpeg(90)))
    one, two = (run_audit(find_sources([str(path)]), AuditSettings(workers=n), progress=False) for n in (1, 2))
    assert one.leaks == two.leaks
    assert one.findings == two.findings


def test_every_wording_is_complete() -> None:
    assert set(FEATURE_NAMES) == {*FEATURES, "combined", "prompt"}
    for wording in CHECKS.values():
        assert all(wording)
    result = Audit([], {}, {}, [], [])
    assert (result.num_errors, result.num_warnings) == (0, 0)
    assert advice.__doc__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no data given"),
        (["--split", "train.jsonl"], "NAME=FILE"),
        (["x.jsonl", "--group-by", "folder"], "group_by is 'folder'"),
        (["none.jsonl"], "data file not found; found 'none.jsonl'"),
        (["pyproject.toml", "--format", "foo"], "foo"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(
    make_set: MakeSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["audit", str(make_set()), "--workers", "1", "--out", str(tmp_path / "file" / "audit")]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "Not a directory" in error
    assert "Traceback" not in error


def test_a_row_without_an_id_is_told_in_its_readers_words(
    make_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_set()
    path.write_text(path.read_text() + "{\n")
    assert main(["audit", str(path), "--workers", "1"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "rows that are no records: 1" in line)
    assert "damaged JSON" in line
    assert path.name in line


def test_names_of_splits(make_set: MakeSet, tmp_path: Path) -> None:
    names = [source.split for source in find_sources(["a/train.jsonl", "b/train.jsonl", "test.json"], [("val", "v")])]
    assert names == ["a/train", "b/train", "test", "val"]
    with pytest.raises(ConfigError, match="no data given"):
        find_sources([])


@pytest.mark.parametrize("quality", [10, 49, 50, 75, 90, 100])
def test_jpeg_quality_is_read_from_the_tables(quality: int, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", quality=quality)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert jpeg_quality(opened.quantization) == quality  # type: ignore[attr-defined]


def test_features_of_embedded_bytes_and_of_names(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), (10, 20, 40)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    features = container_features(ImageInput(data=data), (32, 64))
    assert (features["file_bytes"], features["size"], features["aspect"]) == (len(data), "64x32", 2.0)
    assert "extension" not in features
    assert name_features("Tp_D_0012-3.JPG") == {
        "extension": ".jpg",
        "name_prefix": "tp",
        "name_words": "tp d",
        "name_shape": "a_a_9-9",
        "name_length": 11,
        "name_digits": 5,
    }
    content = content_features(Image.new("RGB", (640, 32), (10, 20, 40)))
    assert (content["mean_blue"], content["std_red"], content["saturation"]) == (40.0, 0.0, 30.0)
