"""`forensics vision infer` from a folder of images to CSV, pictures and explanations: resumed, bad images, refused."""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.config.vision_runs import VisionInferenceConfig, load_vision_config
from finetune.inference.evidence import inspection as vision_inference
from finetune.inference.evidence.explaining import Explainer
from finetune.inference.evidence.inspection import load_models, named_images

THRESHOLD = 0.45


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sound images, one in a folder below, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    sizes = {"a.png": (90, 60), "b.jpg": (64, 120), "c.png": (56, 56), "d.png": (200, 150), "more/a.png": (70, 80)}
    for number, (name, size) in enumerate(sizes.items()):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "b.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (900, 3)).save(folder / "narrow.png")
    return folder


GOOD = ["a.png", "b.jpg", "c.png", "d.png", "more/a.png"]


@pytest.fixture
def settings(tiny_dir: Path, vision_parts: Path, tmp_path: Path) -> Path:
    tree = {
        "base_model_path": str(tiny_dir),
        "visual_lora": {"path": str(vision_parts / "vision_lora"), "layers": [0, 2]},
        "head_checkpoint": str(vision_parts / "heads.safetensors"),
        "heatmap_threshold": THRESHOLD,
        "batch_size": 3,
        "num_workers": 2,
        "user_prompt": ["{evidence}为什么？", "得分{score}，区域：{regions}"],
        "generation": {"max_new_tokens": 4, "temperature": 0.9, "top_p": 0.9},
        "output": {"csv": str(tmp_path / "r.csv"), "evidence_dir": str(tmp_path / "evidence")},
        "device": "cpu",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def infer(settings: Path, *arguments: str) -> int:
    return main(["vision", "infer", "--config", str(settings), *arguments])


def only_verdicts(*more: str) -> tuple[str, ...]:
    return ("--set", "explain=false", *more)


def test_a_folder_becomes_rows_pictures_and_explanations_and_bad_images_do_not_stop_it(
    settings: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(settings, str(photos)) == 1
    captured = capsys.readouterr()
    for name in ("cut.jpg", "empty.png", "narrow.png"):
        assert any(name in line and line.startswith("failed:") for line in captured.err.splitlines())
    assert "8 images" in captured.out
    assert "3 failed" in captured.out
    assert "visual.blocks.0.attn.qkv" in captured.out  # loaded LoRA modules are printed by name
    rows = rows_of(tmp_path / "r.csv")
    assert set(rows) == {*GOOD, "cut.jpg", "empty.png", "narrow.png"}
    assert rows["narrow.png"]["error"]
    assert rows["narrow.png"]["score"] == ""
    journal = [json.loads(line) for line in (tmp_path / "evidence" / "results.jsonl").read_text("utf-8").splitlines()]
    by_id = {row["id"]: row for row in journal}
    for name in GOOD:
        row = rows[name]
        heat = np.asarray(Image.open(tmp_path / "evidence" / row["heatmap"]))
        original = Image.open(photos / name)
        assert heat.shape == (original.height, original.width)
        assert Image.open(tmp_path / "evidence" / row["overlay"]).size == original.size
        assert 0 <= float(row["score"]) <= 1
        for x0, y0, x1, y1 in json.loads(row["boxes"]):
            assert 0 <= x0 < x1 <= original.width
            assert 0 <= y0 < y1 <= original.height
            assert heat[y0:y1, x0:x1].max() >= round(255 * THRESHOLD)
        question = by_id[name]["prompt"]
        assert question.startswith("<image>")
        assert row["regions"] in question
        assert f"{float(row['score']):.2f}" in question
        assert row["explanation"] == by_id[name]["explanation"]
    assert len({rows[name]["prompt_index"] for name in GOOD}) == 2


def test_a_stopped_run_goes_on_and_ends_as_an_unbroken_one(
    settings: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampled explanations included: they depend on seed and id, not on what else ran before."""
    images = [str(photos / name) for name in GOOD[:4]]
    infer(settings, *images)
    whole = rows_of(tmp_path / "r.csv")
    second = ("--set", f"output.csv={tmp_path / 's.csv'}", f"output.evidence_dir={tmp_path / 'second'}", "batch_size=1")
    real = vision_inference.inspect

    def dies_after_two(*arguments: Any) -> Any:
        for number, row in enumerate(real(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(vision_inference, "inspect", dies_after_two)
        assert infer(settings, *reversed(images), *second) == 130
    assert len(rows_of(tmp_path / "s.csv")) == 2
    assert infer(settings, *images, *second) == 0
    assert "2 of 4 images are done already" in capsys.readouterr().out
    resumed = rows_of(tmp_path / "s.csv")
    assert set(resumed) == set(whole)
    for name, row in whole.items():
        for column in ("label", "boxes", "regions", "prompt_index", "explanation", "overlay"):
            assert resumed[name][column] == row[column], (name, column)
        assert float(resumed[name]["score"]) == pytest.approx(float(row["score"]), abs=1e-5)


def test_another_run_does_not_write_into_the_folder(
    settings: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(photos / "a.png")
    assert infer(settings, image, *only_verdicts()) == 0
    before = (tmp_path / "r.csv").read_bytes()
    assert infer(settings, image, *only_verdicts("heatmap_threshold=0.6")) == 2
    error = capsys.readouterr().err
    assert "settings.heatmap_threshold was 0.45, now it is 0.6" in error
    assert "--overwrite" in error
    assert (tmp_path / "r.csv").read_bytes() == before
    assert infer(settings, image, *only_verdicts("heatmap_threshold=0.6"), "--overwrite") == 0
    assert infer(settings, image, *only_verdicts("heatmap_threshold=0.6", "batch_size=1", "num_workers=0")) == 0


def test_two_processes_do_not_write_one_folder(
    settings: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with --overwrite, which would remove what the other one writes; a killed one holds nobody up."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in ((), ("--overwrite",)):
            assert infer(settings, str(photos / "a.png"), *more, *only_verdicts()) == 2
            error = capsys.readouterr().err
            assert f"another process is writing to {folder}; wait for it, or give another" in error
            assert [path.name for path in folder.iterdir()] == [".lock"]
    assert infer(settings, str(photos / "a.png"), *only_verdicts()) == 0
    assert rows_of(tmp_path / "r.csv")["a.png"]["error"] == ""
    assert not (folder / ".lock").exists()


def test_verdicts_alone_do_not_load_the_language_model(settings: Path, photos: Path) -> None:
    for explain in (False, True):
        config = load_vision_config(settings, [f"explain={str(explain).lower()}"], VisionInferenceConfig)
        predictor, _ = load_models(config)
        assert predictor.writes_text == explain
        assert hasattr(predictor.bundle.base, "lm_head") == explain


def test_the_language_model_sees_the_images_without_the_vision_lora_unless_asked(settings: Path, photos: Path) -> None:
    """The LoRA serves the heads; the language model was trained on the tower as it was."""
    config = load_vision_config(settings, ["generation.temperature=0"], VisionInferenceConfig)
    predictor, _ = load_models(config)
    seen: list[torch.Tensor] = []
    handle = predictor.bundle.base.model.visual.merger.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    explainer = Explainer(predictor, config)
    picture = Image.open(photos / "a.png").convert("RGB")
    (((prediction,)),) = predictor.predict_batch([_query("a.png")], [[picture]], with_text=False)
    finding = vision_inference.find("a.png", "a.png", picture, prediction, config)
    explainer.explain([finding])
    config.use_lora_for_text = True
    explainer.explain([finding])
    handle.remove()
    with_lora, without, asked = seen
    assert torch.equal(with_lora, asked)
    assert not torch.allclose(with_lora, without, atol=1e-3)
    config.overlay_as_second_image = True
    assert [p.size for p in explainer.pictures(finding)] == [picture.size, picture.size]
    assert explainer.question(finding)[1].count("<image>") == 2


def _query(name: str) -> Any:
    from finetune.inference.queries import Query
    from finetune.schema import ImageInput

    return Query(name, (ImageInput(path=name),), ())


def test_a_calibration_beside_the_heads_is_used(
    settings: Path, photos: Path, vision_parts: Path, tmp_path: Path
) -> None:
    from finetune.metrics.calibration import Calibration

    Calibration(method="temperature", temperature=4.0).save(tmp_path / "calibration.json")
    image = str(photos / "a.png")
    assert infer(settings, image, *only_verdicts(f"calibration={tmp_path / 'calibration.json'}")) == 0
    row = rows_of(tmp_path / "r.csv")["a.png"]
    raw = float(row["raw_score"])
    logit = np.log(raw / (1 - raw))
    assert float(row["score"]) == pytest.approx(1 / (1 + np.exp(-logit / 4)), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user_prompt": "{scores}"}, ["unknown placeholder {scores}", "did you mean {score}"]),
        ({"system_prompt": "看图<image>"}, ["system_prompt holds <image>"]),
        ({"system_prompt": "依据{evidnce}作答"}, ["system_prompt: {evidnce} is not filled in", "user_prompt"]),
        ({"chat_system_prompt": "{score}"}, ["chat_system_prompt: {score} is not filled in"]),
        ({"chat_system_prompt": "<cls>"}, ["chat_system_prompt holds <cls>"]),
        ({"system_prompt": "a<|im_end|>"}, ["system_prompt holds <|im_end|>"]),
        ({"visual_lora": {"layers": [1, 2]}}, ["visual_lora.layers is [1, 2]", "blocks [0, 2]"]),
        ({"visual_lora": {"path": "nowhere"}}, ["nowhere", "adapter_config.json"]),
        ({"head_checkpoint": "best.pt"}, ["best.pt", "pickle"]),
        ({"head_checkpoint": "nowhere"}, ["nowhere", "does not exist"]),
        ({"base_model_path": "nowhere/at/all"}, ["nowhere/at/all"]),
        ({"calibration": "nowhere.json"}, ["nowhere.json", "no file"]),
        ({"classification_threshold": 1.01}, ["classification_threshold", "0 to 1"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    settings: Path,
    photos: Path,
    tmp_path: Path,
    change: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = json.loads(settings.read_text("utf-8"))
    lora = {**tree["visual_lora"], **change.get("visual_lora", {})}
    settings.write_text(json.dumps({**tree, **change, "visual_lora": lora}), encoding="utf-8")
    assert infer(settings, str(photos / "a.png")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def refused(settings: Path, photos: Path, capsys: pytest.CaptureFixture[str], **change: Any) -> str:
    """The one line that is said about settings with a change."""
    tree = json.loads(settings.read_text("utf-8"))
    settings.write_text(json.dumps({**tree, **change}), encoding="utf-8")
    capsys.readouterr()
    assert infer(settings, str(photos / "a.png")) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


def test_weights_that_do_not_belong_together_are_refused(
    settings: Path,
    photos: Path,
    tiny_dir: Path,
    vision_parts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """LoRA whose keys match nothing; heads of another tower; heads whose configuration says another width or blocks."""
    lora = tmp_path / "lora"
    shutil.copytree(vision_parts / "vision_lora", lora)
    weights = load_file(lora / "adapter_model.safetensors")
    save_file(
        {key.replace("blocks.", "layers."): value for key, value in weights.items()}, lora / "adapter_model.safetensors"
    )
    error = refused(settings, photos, capsys, visual_lora={"path": str(lora)})
    assert str(lora) in error
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k: v * 1.5 if "visual" in k else v for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    own = {"path": None, "layers": None}
    error = refused(settings, photos, capsys, base_model_path=str(base), visual_lora=own)
    assert "another vision tower" in error
    for field, value in (("hidden_size", 24), ("vision_layers", [1])):
        heads = tmp_path / field
        shutil.copytree(vision_parts, heads)
        config = json.loads((heads / "config.json").read_text("utf-8"))
        config["heads"][field] = value
        (heads / "config.json").write_text(json.dumps(config), encoding="utf-8")
        error = refused(
            settings, photos, capsys, base_model_path=str(tiny_dir), visual_lora=own, head_checkpoint=str(heads)
        )
        assert str(heads) in error
    assert not (tmp_path / "evidence").exists()


def test_heads_go_with_the_lora_they_were_trained_with(
    settings: Path,
    photos: Path,
    vision_parts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without it an error; with another one a warning, for the combination may be meant; a copy is the same."""
    heads = tmp_path / "heads"
    shutil.copytree(vision_parts, heads)
    lora = tmp_path / "lora"
    (heads / "vision_lora").rename(lora)
    own = {"head_checkpoint": str(heads), "visual_lora": None}
    assert "trained with LoRA on the tower, and vision_lora is not there" in refused(settings, photos, capsys, **own)
    assert infer(settings, str(photos / "a.png"), *only_verdicts(f"visual_lora.path={lora}")) == 0
    assert "were not trained with the LoRA" in caplog.text
    caplog.clear()
    shutil.copytree(lora, heads / "vision_lora")
    assert infer(settings, str(photos / "a.png"), "--overwrite", *only_verdicts(f"visual_lora.path={lora}")) == 0
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_the_evidence_is_not_written_among_the_images(
    settings: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (photos, photos / "evidence"):
        assert infer(settings, str(photos), "--set", f"output.evidence_dir={place}") == 2
        assert "lies in the folder of images" in capsys.readouterr().err


def test_heads_on_tokens_are_not_taken(
    settings: Path, tiny_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(settings, str(photos / "a.png"), "--set", f"head_checkpoint={tiny_dir}") == 2
    assert "has no heads; expected heads on the vision tower" in capsys.readouterr().err


def test_ids_are_the_paths_below_the_folder_and_differ(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/y/a.png", "z/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = named_images([str(tmp_path / "x"), str(tmp_path / "z"), str(tmp_path / "x" / "a.png")])
    assert list(found) == ["a.png", "y/a.png", (tmp_path / "z" / "a.png").as_posix()]
    assert list(found.values()) == [str(tmp_path / name) for name in ("x/a.png", "x/y/a.png", "z/a.png")]


def test_no_image_is_lost_where_ids_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the first folder lies what is called as the second one's file is by its whole path."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.png", "a/b/x.png", "b/x.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    found = named_images(["a", "b", "./a", str(tmp_path / "b" / "x.png")])
    assert sorted(map(str, found.values())) == ["a/b/x.png", "a/x.png", "b/x.png"]
    assert list(found) == ["b/x.png", "x.png", (tmp_path / "b" / "x.png").as_posix()]


def test_the_general_verbs_take_vision_heads_too(
    vision_parts: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One predictor: predict and evaluate run on a folder of vision parts, without text since there is no language."""
    assert main(["predict", str(photos / "a.png"), "--model", str(vision_parts), "--device", "cpu"]) == 0
    assert "a.png" in capsys.readouterr().out
    entries = [{"image_path": name, "mask_path": None, "label": k % 2} for k, name in enumerate(("a.png", "c.png"))]
    (tmp_path / "e.json").write_text(json.dumps(entries), encoding="utf-8")
    arguments = ["--data", str(tmp_path / "e.json"), "--data-root", str(photos), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(vision_parts), *arguments, "--no-baselines", "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["image"]["n_fake"] == 1
    assert metrics["text"]["parse_rate"] is None


@pytest.mark.slow
def test_a_killed_run_goes_on(settings: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a folder; the second run does the rest, and every image has one row."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 255, (120, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    command = [sys.executable, "-m", "finetune.cli", "vision", "infer", str(folder), "--config", str(settings)]
    command += ["--set", "explain=false", "batch_size=2"]
    journal = tmp_path / "evidence" / "results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= 5:
                process.kill()
                break
            time.sleep(0.01)
        process.wait()
    done = journal.read_bytes().count(b"\n")
    assert 5 <= done < 60
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{done} of 60 images are done already" in again.stdout
    assert sorted(rows_of(tmp_path / "r.csv")) == [f"{number:03d}.png" for number in range(60)]
