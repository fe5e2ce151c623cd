"""An output folder belongs to one run: what another kind of run, or nobody, wrote there is never removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.inference.commands import find_images
from finetune.inference.run_folder import INFERENCE, RUN_FILE, open_run

OWN = ("results.jsonl", "heatmaps")


def take(folder: Path, kind: str = "inference", overwrite: bool = False, **identity: Any) -> bool:
    return open_run(folder, kind, identity, own=OWN, overwrite=overwrite, can_continue=True)


def fill(folder: Path) -> None:
    (folder / "heatmaps").mkdir(parents=True)
    (folder / "heatmaps" / "0.png").write_bytes(b"of somebody")
    (folder / "results.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")


def test_the_same_run_goes_on_and_another_needs_overwrite(tmp_path: Path) -> None:
    assert take(tmp_path / "a", seed=1) is False
    (tmp_path / "a" / "results.jsonl").write_text("{}\n")
    assert take(tmp_path / "a", seed=1) is True
    with pytest.raises(ConfigError, match="seed was 1, now it is 2; add --overwrite"):
        take(tmp_path / "a", seed=2)
    assert (tmp_path / "a" / "results.jsonl").exists()
    assert take(tmp_path / "a", seed=2, overwrite=True) is False
    assert not (tmp_path / "a" / "results.jsonl").exists()


def test_overwrite_replaces_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    take(tmp_path)
    fill(tmp_path)
    take(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", RUN_FILE]


def test_what_no_run_wrote_is_kept_whatever_is_asked(tmp_path: Path) -> None:
    """The snapshots of a training stage have a folder of the same name."""
    fill(tmp_path)
    with pytest.raises(ConfigError, match="add --overwrite to write beside them"):
        take(tmp_path)
    with pytest.raises(ConfigError, match=r"results\.jsonl is of no inference, and this run would replace it"):
        take(tmp_path, overwrite=True)
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match="heatmaps is of no inference"):
        take(tmp_path, overwrite=True)
    assert (tmp_path / "heatmaps" / "0.png").read_bytes() == b"of somebody"
    assert not (tmp_path / RUN_FILE).exists()


def test_files_that_are_not_in_the_way_stay_beside_the_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert take(tmp_path, overwrite=True) is False
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_kind_of_run_is_not_replaced(tmp_path: Path) -> None:
    take(tmp_path, kind="evaluation")
    fill(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"output of another kind of run \(evaluation\)"):
            take(tmp_path, overwrite=overwrite)
    assert (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("note", ["{", "[]", '{"name": "of another tool", "step": 3}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_note_that_is_not_ours_is_never_replaced(tmp_path: Path, note: str, overwrite: bool) -> None:
    fill(tmp_path)
    (tmp_path / RUN_FILE).write_text(note)
    with pytest.raises(ConfigError, match=r"give another folder"):
        take(tmp_path, overwrite=overwrite)
    assert (tmp_path / "results.jsonl").exists()
    assert (tmp_path / RUN_FILE).read_text() == note


def test_written_pictures_among_images_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a later run over the folder; the photographs beside them are not, nor what only looks like output."""
    pictures = tmp_path / "pictures"
    own = ("a.png", "more/b.jpg", "more/masks/b.png", "scene/c.png", "scene/details/masks/c.png")
    written = ("overlays/a.png", "evidence/heatmaps/a.png", "scene/masks/c.png", "scene/overlays/c.png")
    for name in own + written:
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).touch()
    (pictures / "more" / "run.json").write_text('{"kind": "mankind"}')  # somebody else's
    (pictures / "predictions.jsonl").touch()
    (pictures / "scene" / "predictions.jsonl").touch()
    open_run(pictures / "evidence", INFERENCE, {}, own=[], overwrite=True, can_continue=False)
    assert find_images([str(pictures)]) == sorted(str(pictures / name) for name in own)
    said = capsys.readouterr().err
    assert all(str(pictures / name.rpartition("/")[0]) in said for name in written)
    (pictures / "B.HEIC").touch()  # found although Pillow may not read it: said, not skipped
    (pictures / "._a.png").touch()  # what macOS leaves on other disks
    (pictures / "again").symlink_to(pictures)
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    capsys.readouterr()
    assert find_images([str(pictures)]) == [f"{pictures}/B.HEIC", *sorted(str(pictures / name) for name in own)]
    assert f"passed over: {pictures}/gone.png, no file or a link to none" in capsys.readouterr().err
    masks = str(pictures / "scene" / "masks")
    assert find_images([masks]) == [f"{masks}/c.png"]  # named, so meant
