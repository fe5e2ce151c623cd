"""`forensics predict`: verdicts for image files, on the terminal and, with --out, as masks, overlays and JSON lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from finetune.config import GenerationConfig, ModelConfig
from finetune.data.images import load_image
from finetune.data.readers.file_tree import IMAGE_SUFFIXES, iter_files
from finetune.data.template import load_template
from finetune.data.validation import InvalidDataError, Problem, file_errors
from finetune.errors import ConfigError, DataFormatError, ModelLoadError
from finetune.inference.calibrating import calibration_of
from finetune.inference.output import PredictionWriter
from finetune.inference.predictor import Predictor
from finetune.inference.queries import query_for_image
from finetune.inference.run_folder import holds_output_pictures
from finetune.inference.visualization import overlay_mask, png_mark
from finetune.models.loading import load_bundle
from finetune.progress import progress_bar
from finetune.schema import ImageInput, ImageTarget, Prediction, Record

P = TypeVar("P", bound=Predictor)


def load_predictor(arguments: argparse.Namespace) -> Predictor:
    """The predictor that --model, --adapter, --template, the thresholds, --no-calibration and --device describe."""
    device = check_device(arguments.device)
    bundle = load_bundle(ModelConfig(path=arguments.model, adapter=arguments.adapter))
    if bundle.has_new_heads:
        raise ModelLoadError(
            f"{arguments.model} has no trained heads, so its verdicts would be random; give a folder written by "
            "training, e.g. runs/quickstart/best, or --adapter"
        )
    generation = GenerationConfig(
        score_threshold=arguments.threshold,
        mask_threshold=arguments.mask_threshold,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        tta=arguments.tta,
    )
    template = load_template(arguments.template) if arguments.template else None
    asked = "off" if arguments.no_calibration else "auto"
    calibration = calibration_of(bundle, arguments.adapter or arguments.model, asked)
    return Predictor(bundle, generation, template=template, device=device, calibration=calibration)


def load_writer(arguments: argparse.Namespace, kind: type[P], what: str) -> P:
    """A predictor whose language model is asked, that --model, --adapter, --dtype, --quantization, --device and the
    limits describe.

    Args:
        kind: its class. what: that it writes, for the error.

    Raises:
        ModelLoadError: nothing to load. ConfigError: no such device, or a model without a language model.
    """
    device = check_device(arguments.device)
    config = ModelConfig(
        path=arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, quantization=arguments.quantization
    )
    generation = GenerationConfig(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    predictor = kind(load_bundle(config), generation, device=device)
    if not predictor.writes_text:
        raise ConfigError(f"{arguments.model} has no language model, so it writes no {what}; give another --model")
    return predictor


def check_device(name: str) -> str:
    """A usable torch device, `auto` resolved.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here: {reason}; give cpu, cuda or auto") from error
    return name


def find_images(paths: list[str]) -> list[str]:
    """Image files named or lying in the folders named, sorted within each folder; hidden ones are not looked at.

    Masks, heat maps and overlays that an earlier run wrote there are passed over, and said.

    Raises:
        DataFormatError: a path that does not exist, or nothing found.
    """
    found: list[str] = []
    for text in paths:
        if not text:
            raise DataFormatError("an image with an empty path", fix="look whether a variable in the command is empty")
        path = Path(text)
        if path.is_dir():
            found += _images_below(path)
        elif path.is_file():
            found.append(text)
        else:
            raise DataFormatError("image file does not exist", found=text, fix="check the path")
    if not found:
        raise DataFormatError("no image found", found=paths, expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _images_below(folder: Path) -> list[str]:
    named = [folder / name for name in iter_files(folder, IMAGE_SUFFIXES)]
    files = [path for path in named if path.is_file()]
    if len(files) < len(named):
        lost = sorted(set(named) - set(files))
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        print(f"passed over: {lost[0]}{others}, no file or a link to none", file=sys.stderr)
    written = {place for place in {path.parent for path in files} if place != folder and holds_output_pictures(place)}
    for place in sorted(written):
        print(f"passed over: {place}, pictures that an earlier run wrote", file=sys.stderr)
    return [str(path) for path in files if path.parent not in written]


def _refuse_unreadable(files: Sequence[str]) -> None:
    """Every image whose header or end shows that it cannot be read, before the first is judged.

    Raises:
        InvalidDataError: names them.
    """
    problems: list[Problem] = []
    for file in progress_bar(
        files, total=len(files), desc="checking", unit="image", leave=False, disable=len(files) < 2
    ):
        asked = Record(file, (ImageInput(path=file),), (ImageTarget(),))
        problems += [Problem("error", file, str(error)) for error in file_errors(asked, check_pixels=False)]
    if problems:
        raise InvalidDataError(
            f"{len(problems)} of {len(files)} images cannot be read; remove them, or use forensics vision infer, which "
            "goes on without them",
            problems,
        )


def predict_files(arguments: argparse.Namespace) -> int:
    """Handler of `forensics predict`; exit status 0."""
    files = find_images(arguments.images)
    _refuse_unreadable(files)
    writer = None if arguments.out is None else PredictionWriter(arguments.out, inputs=files)
    if writer is not None and (writer.out_dir / "metrics.json").is_file():
        raise ConfigError(f"--out {arguments.out} holds an evaluation, whose predictions would go; give another folder")
    predictor = load_predictor(arguments)
    queries = [query_for_image(path, predictor.template) for path in files]
    results = predictor.predict(queries, with_text=not arguments.no_text)
    progress = progress_bar(results, total=len(files), unit="image", disable=len(files) <= 1)
    if writer is None:
        for (prediction,) in progress:
            tqdm.write(describe(prediction, predictor.generation.mask_threshold))
        return 0
    with writer:
        (writer.out_dir / "overlays").mkdir(exist_ok=True)
        for (prediction,) in progress:
            stem = writer.write(prediction)
            place = writer.claim(writer.out_dir / "overlays" / f"{stem}.png")
            _save_overlay(prediction, place, predictor.generation.mask_threshold)
            tqdm.write(describe(prediction, predictor.generation.mask_threshold))
    print(f"wrote {arguments.out}/predictions.jsonl, masks/ and overlays/")
    return 0


def describe(prediction: Prediction, mask_threshold: float) -> str:
    """One or two lines for the terminal: verdict, score, marked area, text."""
    area = (
        ""
        if prediction.mask_scores is None
        else f"  area {100 * float((prediction.mask_scores >= mask_threshold).mean()):.1f} %"
    )
    score = f"score {prediction.score:.3f}"
    verdict = "tampered" if prediction.label else "real    "
    if not prediction.is_judged:
        verdict, score = "no verdict", "(no cls head, and the answer cannot be read)"
    own = "" if prediction.raw_score is None else f" (uncalibrated {prediction.raw_score:.3f})"
    told = prediction.operation if prediction.label == 1 else ""
    how = f"  {told}?" if told else ""
    line = f"{verdict}  {score}{own}{area}{how}  {prediction.image_path}"
    return f"{line}\n    {prediction.text}" if prediction.text else line


def _save_overlay(prediction: Prediction, path: Path, threshold: float) -> None:
    image = np.asarray(load_image(ImageInput(path=prediction.image_path), prediction.id))
    if prediction.mask_scores is not None:
        image = overlay_mask(image, prediction.mask_scores, threshold=threshold)
    Image.fromarray(image).save(path, pnginfo=png_mark())
