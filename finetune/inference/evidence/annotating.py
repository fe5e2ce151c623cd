"""`forensics vision annotate`: records whose questions hold the heat map's evidence, to train explanations on (part A).

The question is the one that `forensics vision infer` would ask, so training and use agree. The answer is the record's
own, or is put together from its label, its evidence text and its true mask; the heat map never speaks in the answer.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.config import SourceConfig
from finetune.config.vision_runs import VisionInferenceConfig, load_vision_config
from finetune.data.images import image_size_hw
from finetune.data.masks import load_mask
from finetune.data.readers.options import options_from
from finetune.data.sources import read_sources, spread
from finetune.data.storage.atomic import write_atomically
from finetune.data.storage.serialization import json_text, record_to_json
from finetune.data.template import load_template
from finetune.data.validation import validate_for_training
from finetune.errors import ConfigError, DataFormatError
from finetune.inference.evidence.explaining import Finding, prompts_of
from finetune.inference.evidence.folder import file_stem
from finetune.inference.evidence.inspection import find
from finetune.inference.evidence.models import open_vision_predictor
from finetune.inference.evidence.predicting import predict_records
from finetune.inference.evidence.prompts import SYSTEM_PROMPTS, choose_prompt, fill_prompt, literal_prompt
from finetune.inference.evidence.wording import Language, find_regions, place_word
from finetune.inference.predictor import Predictor
from finetune.inference.replacing import refuse_inputs
from finetune.progress import progress_bar
from finetune.schema import ImageInput, ImageTarget, Prediction, Record, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens


def annotate_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics vision annotate`; exit status 0."""
    config = load_vision_config(arguments.config, arguments.overrides, VisionInferenceConfig)
    prompts_of(config)
    out = Path(arguments.out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out is {out}; give a file ending in .jsonl")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"--out {out} exists; add --overwrite, or give another file")
    refuse_inputs(out, "--out", [arguments.data])
    source = SourceConfig(arguments.data, arguments.format, arguments.data_root, options_from(arguments.option))
    records = read_sources([source], "train")
    records = records if arguments.max_samples is None else spread(records, arguments.max_samples)
    check_annotatable(records)
    predictor, _ = open_vision_predictor(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = annotated(records, predictor, config, out, arguments.without_evidence, keep_targets=arguments.keep_targets)
    progress = progress_bar(made, total=len(records), unit="record")
    write_atomically(out, (f"{json_text(record_to_json(r, out.parent), r)}\n".encode() for r in progress))
    print(f"wrote {len(records)} records to {out}; train them with configs/train/explain_3b.yaml or explain_tiny.yaml")
    return 0


def check_annotatable(records: Sequence[Record]) -> None:
    """Every file that is missing at once, and records that no evidence can be put into.

    Raises:
        DataFormatError: not exactly one image, or neither a label nor a written answer.
    """
    labelled = [record for record in records if record.label is not None]
    if labelled:
        validate_for_training(labelled, SpecialTokens(), check_pixels=False, has_text=False)
    for record in records:
        for image in record.images:
            image_size_hw(image, record.id, record.source)
        if len(record.images) != 1:
            raise DataFormatError(
                "evidence can be put into records with one image only",
                record=record.id,
                source=record.source,
                found=f"{len(record.images)} images",
                fix="leave the record out",
            )
        roles = [turn.role for turn in record.turns]
        if roles and "user" not in roles:
            raise DataFormatError(
                "a conversation without a question, so there is no place for the evidence",
                record=record.id,
                source=record.source,
                fix="add a user turn, or leave the record out",
            )
        if "assistant" not in roles and record.targets[0].label is None:
            raise DataFormatError(
                "neither a label nor a written answer, so there is nothing to learn",
                record=record.id,
                source=record.source,
                fix="give 'labels' (0 real, 1 tampered), or leave the record out",
            )


def annotated(
    records: Sequence[Record],
    predictor: Predictor,
    config: VisionInferenceConfig,
    out: Path,
    without_evidence: float = 0.0,
    *,
    keep_targets: bool = False,
) -> Iterator[Record]:
    """Each record with evidence in its question; overlays are written beside `out` where they are shown too.

    Args:
        without_evidence: share of the records, drawn by seed and id, that keep their question without evidence.
        keep_targets: keep labels and masks, so that heads on forensic tokens train as well; else they go into
            `provenance.vision` and the record trains text only.

    Raises:
        DataFormatError: an image that cannot be read.
    """
    for record, (picture,), (prediction,) in predict_records(predictor, records, config.batch_size, config.num_workers):
        finding = find(record.id, record.images[0].path or "", picture, prediction, config)
        has_evidence = random.Random(f"{config.seed} {record.id}").random() >= without_evidence
        yield annotate(record, finding if has_evidence else None, prediction, config, out, keep_targets)


def annotate(
    record: Record,
    finding: Finding | None,
    prediction: Prediction,
    config: VisionInferenceConfig,
    out: Path,
    keep_targets: bool,
) -> Record:
    """One record with the evidence of `finding` in its question, or with its question as it is where that is None."""
    images, targets = list(record.images), list(record.targets)
    turns = _turns(record, prediction.size_hw, config.language)
    if not keep_targets:
        turns = [_without_tokens(turn) for turn in turns]
        targets = [ImageTarget() for _ in targets]
    if finding is not None:
        num_images = 1 + config.overlay_as_second_image
        if config.overlay_as_second_image:
            images.append(ImageInput(path=_save_overlay(out, finding)))
            targets.append(ImageTarget())
        asked = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[asked] = Turn("user", _question(record, finding, config, num_images))
    if turns[0].role != "system":
        turns.insert(0, Turn("system", config.system_prompt or SYSTEM_PROMPTS[config.language]))
    told: dict[str, Any] = {"score": round(prediction.score, 6), "label": record.targets[0].label}
    told["has_evidence"] = finding is not None
    provenance = {**record.provenance, "vision": told}
    return replace(record, images=tuple(images), targets=tuple(targets), turns=tuple(turns), provenance=provenance)


def _without_tokens(turn: Turn) -> Turn:
    """An assistant turn without forensic tokens, in short or written out; any other as it is."""
    tokens = SpecialTokens()
    return Turn(turn.role, tokens.strip(tokens.expand(turn.content))) if turn.role == "assistant" else turn


def _turns(record: Record, size_hw: tuple[int, int], language: Language) -> list[Turn]:
    """The record's own turns; what is missing of question and answer comes from the template and the targets."""
    turns = list(record.turns) or [Turn("user", load_template(language).prompts[0])]
    if not any(turn.role == "assistant" for turn in turns):
        turns.append(Turn("assistant", answer_text(record, size_hw, language)))
    return turns


def answer_text(record: Record, size_hw: tuple[int, int], language: Language) -> str:
    """What is true of an image, in words: verdict, the record's evidence text, regions of its true mask."""
    target = record.targets[0]
    label = int(target.label or 0)
    reason = (target.evidence or load_template(language).evidence[label]).rstrip("。. ")
    mask = load_mask(target, size_hw, record.id, record.source) if label else None
    regions = find_regions(mask.astype("float32"), 0.5)[0] if mask is not None else ()
    if language == "zh":
        text = f"结论：{'该图像经过篡改' if label else '该图像真实'}。依据：{reason}。"
        places = [f"{place_word(r, 'zh')}{list(r.box_xyxy)}" for r in regions]
        return text + (f"篡改区域：{'、'.join(places)}。" if places else "")
    text = f"Conclusion: this image is {'tampered' if label else 'authentic'}. Reason: {reason}."
    places = [f"{place_word(r, 'en')} {list(r.box_xyxy)}" for r in regions]
    return text + (f" Tampered: {', '.join(places)}." if places else "")


def _question(record: Record, finding: Finding, config: VisionInferenceConfig, num_images: int) -> str:
    """The record's own first question with the evidence before it, or one of the configured prompts."""
    own = next((turn.content for turn in record.turns if turn.role == "user"), None)
    if own is None:
        prompts = prompts_of(config)
        chosen = prompts[choose_prompt(prompts, config.seed, record.id)]
    else:  # the overlay stands behind the image it belongs to
        chosen = literal_prompt(own).replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER * num_images, 1)
    return fill_prompt(chosen, finding.evidence, config.language, num_images)


def _save_overlay(out: Path, finding: Finding) -> str:
    folder = out.with_name(f"{out.stem}_overlays")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(finding.id)}.png"
    Image.fromarray(finding.overlay).save(path)
    return str(path)
