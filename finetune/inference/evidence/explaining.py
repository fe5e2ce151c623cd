"""The language model's explanation of a verdict: it is given score, regions in words and boxes, perhaps the overlay.

It does not decide anything: verdict and regions come from the heads and stand in the question. Which question an image
gets, and what is sampled, depends on the seed and the image's id alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from finetune.config.vision_runs import VisionInferenceConfig
from finetune.errors import ConfigError
from finetune.inference.evidence.prompts import (
    QUESTIONS,
    SYSTEM_PROMPTS,
    check_prompts,
    check_system,
    choose_prompt,
    fill_prompt,
)
from finetune.inference.evidence.wording import Evidence
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query, batched
from finetune.inference.visualization import UInt8
from finetune.schema import ImageInput, Turn


@dataclass(frozen=True)
class Finding:
    """One inspected image: what an explanation starts from.

    Args:
        id: of the image. path: its file.
        picture: RGB, upright. overlay: (h, w, 3) uint8, perhaps smaller.
    """

    id: str
    path: str
    picture: Image.Image = field(repr=False)
    overlay: UInt8 = field(repr=False)
    evidence: Evidence


@dataclass(frozen=True)
class Explanation:
    """The answer, the question it was given, and the number of that question among those configured."""

    text: str
    question: str
    prompt_index: int


def prompts_of(config: VisionInferenceConfig) -> list[str]:
    """The questions to draw from: `user_prompt` and `prompt_templates`, or the built-in ones.

    Raises:
        ConfigError: see `check_prompts` and `check_system`.
    """
    check_system(config.system_prompt, "system_prompt")
    check_system(config.chat_system_prompt, "chat_system_prompt")
    own = [config.user_prompt] if isinstance(config.user_prompt, str) else config.user_prompt
    own = [prompt for prompt in own or [] if prompt]
    num_images = 1 + config.overlay_as_second_image
    check_prompts(own, num_images, "user_prompt")
    check_prompts(config.prompt_templates, num_images, "prompt_templates")
    return [*own, *config.prompt_templates] or list(QUESTIONS[config.language])


class Explainer:
    """Asks the language model of a predictor about findings.

    Args:
        predictor: with its language model.
        config: prompts, seed, language, what the model is shown.

    Raises:
        ConfigError: a prompt that cannot be filled in, or no language model.
    """

    def __init__(self, predictor: Predictor, config: VisionInferenceConfig) -> None:
        if not predictor.writes_text:
            raise ConfigError("explanations need the language model, which was not loaded; or set explain to false")
        self.predictor, self.config = predictor, config
        self.prompts = prompts_of(config)
        self.system = config.system_prompt or SYSTEM_PROMPTS[config.language]

    def explain(self, findings: Sequence[Finding]) -> list[Explanation]:
        """One explanation per finding, in order."""
        size = self.config.explanation_batch_size or (1 if self.config.generation.temperature else len(findings))
        return [found for batch in batched(findings, max(1, size)) for found in self._batch(batch)]

    def question(self, finding: Finding) -> tuple[int, str]:
        """Number and filled-in text of the question about a finding."""
        index = choose_prompt(self.prompts, self.config.seed, finding.id)
        num_images = 1 + self.config.overlay_as_second_image
        return index, fill_prompt(self.prompts[index], finding.evidence, self.config.language, num_images)

    def pictures(self, finding: Finding) -> list[Image.Image]:
        """What the language model is shown."""
        if not self.config.overlay_as_second_image:
            return [finding.picture]
        return [finding.picture, Image.fromarray(finding.overlay)]

    def _batch(self, findings: Sequence[Finding]) -> list[Explanation]:
        questions = [self.question(finding) for finding in findings]
        queries = [
            Query(finding.id, (ImageInput(path=finding.path),), (Turn("system", self.system), Turn("user", text)))
            for finding, (_, text) in zip(findings, questions, strict=True)
        ]
        shown = [self.pictures(finding) for finding in findings]
        devices = [self.predictor.device] if self.predictor.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_seed(self.config.seed, findings[0].id))
            texts = self.predictor.write(queries, shown, uses_adapter=self.config.use_lora_for_text)
        return [Explanation(text, question, k) for text, (k, question) in zip(texts, questions, strict=True)]


def _seed(seed: int, image_id: str) -> int:
    digest = hashlib.blake2b(f"explain\0{seed}\0{image_id}".encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest, "big")
