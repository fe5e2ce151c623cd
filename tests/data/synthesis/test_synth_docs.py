"""The documentation names everything there is, and its examples are records that load."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.data.readers import read_records
from finetune.data.synthesis import SynthConfig
from finetune.data.synthesis.conversations import RECORD_KINDS
from finetune.data.synthesis.degradations import DEGRADATIONS
from finetune.data.synthesis.operations import OPERATIONS
from finetune.data.synthesis.photos import find_photos
from finetune.data.synthesis.regions import SHAPES
from finetune.data.synthesis.samples import make_sample, plan_tasks
from finetune.data.validation import check_records
from finetune.special_tokens import SpecialTokens

DOCUMENTS = ("docs/synthesis.md", "docs/synthesis.zh.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_everything_is_named(document: str, repo_root: Path) -> None:
    text = (repo_root / document).read_text(encoding="utf-8")
    keys = [item.name for item in fields(SynthConfig)]
    missing = [name for name in (*keys, *OPERATIONS, *DEGRADATIONS, *SHAPES, *RECORD_KINDS) if f"`{name}`" not in text]
    assert not missing


def test_every_key_of_a_provenance_is_named(repo_root: Path) -> None:
    """Of what was drawn for 60 tampered pictures, half of them from grey photographs, which show pages of text."""
    photos = find_photos(None, 0.25, 1, progress=False)
    keys: set[str] = set()
    for changes in ({}, {"grey_photo_weight": 20.0, "operation_settings": {"shape_weights": {"text": 1.0}}}):
        config = SynthConfig(num_train=60, num_eval=0, num_val=0, workers=1, **changes)  # type: ignore[arg-type]
        for task in plan_tasks(config, "train"):
            if task.operation is None:
                continue
            provenance = make_sample(task, config, photos).provenance
            keys |= set(provenance["operation"])
            for step in provenance["degradations"]:
                keys |= set(step) - {"name"}
    assert {"merged", "text_parts", "visible_change", "visible_share"} <= keys
    for document in DOCUMENTS:
        text = (repo_root / document).read_text(encoding="utf-8")
        assert not [key for key in sorted(keys) if f"`{key}`" not in text], document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_are_records_of_every_kind(document: str, repo_root: Path, tmp_path: Path) -> None:
    text = (repo_root / document).read_text(encoding="utf-8")
    blocks = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    assert {block["id"].split("-")[1] for block in blocks} == set(RECORD_KINDS) - {"single"}
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, blocks)), encoding="utf-8")
    records = read_records(tmp_path / "examples.jsonl")
    problems = check_records(records, SpecialTokens(), check_pixels=False)
    assert all("file not found" in problem.message for problem in problems)  # the images are not shipped
