"""`forensics vision infer`: every image of some folders gets verdict, overlay and explanation, into a CSV and a folder.

Made for thousands of images: images are read ahead, each row is on the disk before the next batch, a run that was
stopped goes on, and an image that cannot be used has a row with its error while the others go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.config import GenerationConfig
from finetune.config.vision_runs import (
    VisionInferenceConfig,
    check_output,
    identifying_settings,
    load_vision_config,
)
from finetune.data.dataset import processed_sizes
from finetune.data.images import load_image
from finetune.errors import ConfigError, DataFormatError
from finetune.inference.commands import find_images
from finetune.inference.evidence.explaining import Explainer, Explanation, Finding, prompts_of
from finetune.inference.evidence.folder import EvidenceFolder, failed_row, file_stamp, held
from finetune.inference.evidence.models import open_vision_predictor
from finetune.inference.evidence.overlay import draw_overlay
from finetune.inference.evidence.prefetch import prefetch
from finetune.inference.evidence.wording import boxes_text, gather_evidence, regions_text, verdict_word
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, batched
from finetune.progress import progress_bar
from finetune.schema import ImageInput, Prediction

_NO_INFLUENCE = (
    "images",
    "output",
    "num_workers",
    "device",
    "batch_size",
    "explanation_batch_size",
    "chat_system_prompt",
)
"""Settings that may differ between a run and its continuation: they change where and how fast, not what."""
_PATHS = ("base_model_path", "visual_lora", "head_checkpoint", "calibration")
"""Settings that stand in a run's identity by what they lead to, so that a moved model is the same model."""
_FAILURES_SHOWN = 20


def infer_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics vision infer`; exit status 0, or 1 where an image could not be used."""
    config = load_vision_config(arguments.config, arguments.overrides, VisionInferenceConfig)
    check_output(config)
    given = arguments.images or config.given_images
    images = named_images(given)
    refuse_own_output(given, config.output.evidence_dir)
    prompts_of(config)  # refuses before anything is loaded
    predictor, models = load_models(config)
    with_text = Explainer(predictor, config) if config.explain else None
    identity = {"settings": influential(config), "model": models}
    with held(config.output.evidence_dir):
        output = EvidenceFolder(config.output.csv, config.output.evidence_dir, identity, overwrite=arguments.overwrite)
        images = output.named_as_before(images)
        todo = output.pending({name: file_stamp(path) for name, path in images.items()})
        if output.is_resumed:
            print(f"{len(images) - len(todo)} of {len(images)} images are done already; going on with {len(todo)}")
        with output, progress_bar(total=len(images), initial=len(images) - len(todo), unit="image") as progress:
            for row in inspect({name: images[name] for name in todo}, predictor, with_text, config, output):
                output.write(row)
                progress.update()
    return _summary([output.rows[name] for name in images], config)


def refuse_own_output(paths: Sequence[str], evidence_dir: str) -> None:
    """Overlays written into a folder of images would be inspected by the next run.

    Raises:
        ConfigError: the evidence folder lies in, or is, one of the folders of images.
    """
    target = Path(evidence_dir).resolve()
    for path in map(Path, paths):
        if path.is_dir() and target.is_relative_to(path.resolve()):
            raise ConfigError(
                f"output.evidence_dir {evidence_dir} lies in the folder of images {path}, so its pictures would be "
                "inspected too; give a folder outside"
            )


def load_models(config: VisionInferenceConfig) -> tuple[Predictor, dict[str, Any]]:
    """The predictor, with the language model where explanations are asked for, and the identity of its weights."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # hints about sampling flags of a generation_config.json would tear the progress bar
    decoding = config.generation
    generation = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.temperature > 0,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
    )
    return open_vision_predictor(config, with_language=config.explain, generation=generation)


def influential(config: VisionInferenceConfig) -> dict[str, Any]:
    """The settings that a result depends on, without paths."""
    settings = identifying_settings(config)
    return {key: value for key, value in settings.items() if key not in (*_NO_INFLUENCE, *_PATHS)}


def named_images(paths: Sequence[str]) -> dict[str, str]:
    """Image files by id, each once: the path below the folder given, or the file's name; where two would be alike the
    path as it was given, or the absolute one.

    Raises:
        ConfigError: nothing given. DataFormatError: a path that does not exist, or a folder without images.
    """
    if not paths:
        raise ConfigError("no images given; name files or folders on the command line, or as 'images' in the file")
    found: dict[str, str] = {}
    seen: set[str] = set()
    for given in paths:
        is_folder = Path(given).is_dir()
        for path in find_images([given]):
            absolute = Path(os.path.abspath(path)).as_posix()
            if absolute in seen:
                continue
            seen.add(absolute)
            short = Path(path).relative_to(given).as_posix() if is_folder else Path(path).name
            names = (short, Path(path).as_posix(), absolute)
            found[next(name for name in names if name not in found)] = path
    return found


def inspect(
    images: dict[str, str],
    predictor: Predictor,
    explainer: Explainer | None,
    config: VisionInferenceConfig,
    output: EvidenceFolder,
) -> Iterator[dict[str, Any]]:
    """The row of each image, in order within each batch's good and bad ones; pictures are written on the way.

    Args:
        images: file by id.
    """
    loaded = prefetch(images.items(), lambda item: _open(item, predictor), config.num_workers)
    for batch in batched(loaded, config.batch_size):
        good = []
        for (name, path), picture in batch:
            if isinstance(picture, DataFormatError):
                yield failed_row(name, path, file_stamp(path), str(picture))
            else:
                good.append((name, path, picture))
        for finding, prediction, explanation in _inspect_batch(good, predictor, explainer, config):
            yield _row(finding, prediction, explanation, config, output)


def _open(item: tuple[str, str], predictor: Predictor) -> Image.Image:
    """Decode one image and make sure that the model can take it."""
    name, path = item
    picture = load_image(ImageInput(path=path), name)
    processed_sizes([(picture.height, picture.width)], predictor.bundle.processor.image_processor, name)
    return picture


def _inspect_batch(
    good: Sequence[tuple[str, str, Image.Image]],
    predictor: Predictor,
    explainer: Explainer | None,
    config: VisionInferenceConfig,
) -> Iterator[tuple[Finding, Prediction, Explanation | None]]:
    """Verdicts and explanations of images that are open; halves of the batch where it does not fit into the GPU.

    Raises:
        ConfigError: a single image does not fit.
    """
    if not good:
        return
    try:
        queries = [Query(name, (ImageInput(path=path),), ()) for name, path, _ in good]
        results = predictor.predict_batch(queries, [[picture] for _, _, picture in good], with_text=False)
        findings = [find(*entry, prediction, config) for entry, (prediction,) in zip(good, results, strict=True)]
        texts = explainer.explain(findings) if explainer is not None else [None] * len(good)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        if len(good) == 1:
            raise ConfigError(
                f"{good[0][1]} does not fit into the GPU's memory; set max_pixels, e.g. max_pixels=1003520"
            ) from error
        half = len(good) // 2
        yield from _inspect_batch(good[:half], predictor, explainer, config)
        yield from _inspect_batch(good[half:], predictor, explainer, config)
        return
    yield from zip(findings, (prediction for (prediction,) in results), texts, strict=True)


def find(name: str, path: str, picture: Image.Image, prediction: Prediction, config: VisionInferenceConfig) -> Finding:
    """A prediction as evidence, with its overlay."""
    evidence = gather_evidence(
        prediction.score,
        prediction.label,
        prediction.mask_scores,
        prediction.size_hw,
        threshold=config.classification_threshold,
        heatmap_threshold=config.heatmap_threshold,
        max_regions=config.max_regions,
        min_area=config.min_region_area,
    )
    boxes = [region.box_xyxy for region in evidence.regions]
    overlay = draw_overlay(picture, prediction.mask_scores, boxes, config.heatmap_threshold, config.overlay_side)
    return Finding(name, path, picture, overlay, evidence)


def _row(
    finding: Finding,
    prediction: Prediction,
    explanation: Explanation | None,
    config: VisionInferenceConfig,
    output: EvidenceFolder,
) -> dict[str, Any]:
    evidence = finding.evidence
    overlay, heat_map = output.save_pictures(finding.id, finding.overlay, prediction.mask_scores)
    return {
        "id": finding.id,
        "image_path": finding.path,
        "label": prediction.label,
        "verdict": verdict_word(prediction.label, config.language),
        "score": round(prediction.score, 6),
        "raw_score": round(prediction.own_score, 6),
        "num_regions": evidence.num_regions,
        "area": round(evidence.area, 6),
        "boxes": boxes_text(evidence),
        "regions": regions_text(evidence, config.language),
        "prompt_index": None if explanation is None else explanation.prompt_index,
        "explanation": None if explanation is None else explanation.text,
        "overlay": overlay,
        "heatmap": heat_map,
        "error": "",
        "prompt": None if explanation is None else explanation.question,
        "stamp": file_stamp(finding.path),
    }


def _summary(rows: Sequence[dict[str, Any]], config: VisionInferenceConfig) -> int:
    """Counts, and every image that could not be used (in the CSV too); the exit status."""
    failed = [row for row in rows if row["error"]]
    tampered = sum(row["label"] == 1 for row in rows)
    print(f"{len(rows)} images: {tampered} tampered, {len(rows) - tampered - len(failed)} real, {len(failed)} failed")
    if len(rows) > len(failed) and not any(row["heatmap"] for row in rows):
        print("these heads have no heat map (stage A): verdicts only, without overlays and regions")
    empty = [row for row in rows if not row["error"] and row["heatmap"] and not row["num_regions"]]
    if flagged := sum(row["label"] == 1 for row in empty):
        print(
            f"{flagged} images called tampered have an empty heat map: no pixel reaches "
            f"heatmap_threshold={config.heatmap_threshold:g}; a lower one shows more"
        )
    for row in failed[:_FAILURES_SHOWN]:
        print(f"failed: {row['error']}", file=sys.stderr)
    if len(failed) > _FAILURES_SHOWN:
        print(f"failed: and {len(failed) - _FAILURES_SHOWN} more, see the column 'error'", file=sys.stderr)
    print(f"wrote {config.output.csv} and {config.output.evidence_dir}/ (overlays/, heatmaps/, results.jsonl)")
    return 1 if failed else 0
