"""Predictions on disk: `predictions.jsonl` and 8-bit score masks beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from finetune.errors import ConfigError
from finetune.inference.replacing import refuse_inputs_among
from finetune.inference.visualization import is_marked, save_mask_png
from finetune.schema import Polygon, Prediction


class PredictionWriter:
    """Writes one line per prediction as it comes; a context manager. Where it ends well, pictures are removed that an
    earlier file of this name lists and this one does not.

    A line: `{id, image_path, label, score, raw_score, mask_path, polygons, text, parse_ok, text_polygons, size_hw}`;
    `label` is the verdict (0 real, 1 tampered), `raw_score` the score before calibration, `mask_path` is relative to
    the folder and null without a mask, its pixels are scores times 255. Polygons are `[[[x, y], ...], ...]` in pixels
    of the original image; `text_polygons` are those the text states, null where it could not be read. A model with
    `heads.operations` adds `operations`: the share of each, 1 in all, which means something where `label` is 1.
    Evaluations add `label_true`, and `f1` where they measure it.

    Args:
        inputs: images and masks that are read, none of which may lie where pictures are written.

    Raises:
        ConfigError: one does; while writing, a picture is in the way that no run has written.
    """

    def __init__(self, out_dir: str | Path, name: str = "predictions.jsonl", inputs: Iterable[str | Path] = ()) -> None:
        self.out_dir, self.name = Path(out_dir), name
        refuse_inputs_among(self.out_dir, ("masks", "overlays"), inputs)
        self._file: TextIO | None = None
        self._names: set[str] = set()
        self._earlier: set[str] = set()

    def __enter__(self) -> PredictionWriter:
        self._earlier = self._listed()
        (self.out_dir / "masks").mkdir(parents=True, exist_ok=True)
        self._file = (self.out_dir / self.name).open("w", encoding="utf-8")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._forget(self._earlier - {f"{stem}.png" for stem in self._names})

    def _listed(self) -> set[str]:
        """Names of the mask files that the file lists as an earlier run left it."""
        file = self.out_dir / self.name
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return set(re.findall(r'"mask_path": "masks/([\w.-]+\.png)"', text))

    def _forget(self, names: set[str]) -> None:
        for folder in (self.out_dir / "masks", self.out_dir / "overlays"):
            for path in () if folder.is_symlink() else (folder / name for name in sorted(names)):
                if path.is_file():
                    path.unlink()

    def write(self, prediction: Prediction, **known: Any) -> str:
        """Write one prediction; returns the file stem its pictures use.

        Args:
            known: further keys of the line, such as `label_true`.
        """
        assert self._file is not None, "use PredictionWriter as a context manager"
        stem = self._unique_name(prediction.id)
        mask_path = None
        if prediction.mask_scores is not None:
            mask_path = f"masks/{stem}.png"
            save_mask_png(prediction.mask_scores, self.claim(self.out_dir / mask_path))
        self._file.write(json.dumps(as_line(prediction, mask_path) | known, ensure_ascii=False) + "\n")
        return stem

    def claim(self, path: Path) -> Path:
        """A picture's path, refused where a file is there that no run has written.

        Raises:
            ConfigError: as said.
        """
        if path.name not in self._earlier and path.exists() and not is_marked(path):
            raise ConfigError(f"{path} would be replaced, and no run wrote it; give another --out, or move it away")
        return path

    def _unique_name(self, name: str) -> str:
        name = re.sub(r"\.(jpe?g|png|bmp|tiff?|webp|gif)$", "", Path(name).name, flags=re.IGNORECASE)
        stem = base = re.sub(r"[^\w.-]+", "_", name or "image")[:80]
        number = 1
        while stem in self._names:
            number += 1
            stem = f"{base}-{number}"
        self._names.add(stem)
        return stem


def as_line(prediction: Prediction, mask_path: str | None) -> dict[str, Any]:
    """The JSON object of one prediction; verdict and score are null where there is none."""
    is_judged = prediction.is_judged
    line: dict[str, Any] = {
        "id": prediction.id,
        "image_path": prediction.image_path,
        "label": prediction.label if is_judged else None,
        "score": round(prediction.score, 6) if is_judged else None,
        "raw_score": round(prediction.own_score, 6) if is_judged else None,
        "mask_path": mask_path,
        "polygons": _points(prediction.polygons),
        "text": prediction.text,
        "parse_ok": prediction.parse_ok,
        "text_polygons": None if prediction.text_polygons is None else _points(prediction.text_polygons),
        "size_hw": list(prediction.size_hw),
    }
    if prediction.operations is not None:
        line["operations"] = {name: round(share, 4) for name, share in prediction.operations.items()}
    return line


def _points(polygons: Sequence[Polygon]) -> list[list[list[float]]]:
    return [[[round(x, 1), round(y, 1)] for x, y in polygon] for polygon in polygons]
