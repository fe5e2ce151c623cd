"""Questions that give the language model the evidence: placeholders, built-in wordings, which one an image gets.

`{name}` with a known name is filled in; other braces stay as they are, so that JSON may stand in a prompt; `{{name}}`
is the literal `{name}`. A prompt without any placeholder gets the evidence before it: it is always given.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence

from finetune.data.token_checks import program_token
from finetune.errors import ConfigError
from finetune.inference.evidence.wording import (
    Evidence,
    Language,
    boxes_text,
    evidence_text,
    regions_text,
    score_text,
    verdict_word,
)
from finetune.special_tokens import IMAGE_PLACEHOLDER

PLACEHOLDERS: dict[str, Callable[[Evidence, Language], str]] = {
    "evidence": evidence_text,
    "verdict": lambda evidence, language: verdict_word(evidence.label, language),
    "score": lambda evidence, _: score_text(evidence.score, evidence.threshold),
    "percent": lambda evidence, _: f"{score_text(100 * evidence.score, 100 * evidence.threshold, 0)}%",
    "threshold": lambda evidence, _: f"{evidence.threshold:g}",
    "heatmap_threshold": lambda evidence, _: f"{evidence.heatmap_threshold:g}",
    "regions": regions_text,
    "boxes": lambda evidence, _: boxes_text(evidence),
    "num_regions": lambda evidence, _: str(evidence.num_regions),
    "area": lambda evidence, _: f"{100 * evidence.area:.1f}%",
    "width": lambda evidence, _: str(evidence.size_hw[1]),
    "height": lambda evidence, _: str(evidence.size_hw[0]),
}
"""What `{name}` stands for."""

SYSTEM_PROMPTS: dict[Language, str] = {
    "zh": "你是一名图像取证专家。检测模型已给出判定、得分与可疑区域，请结合图像内容用简洁、客观的语言作出说明。"
    "不要编造检测结果中没有的区域。",
    "en": "You are an image forensics expert. A detector has given its verdict, score and suspicious regions; explain "
    "them with what the image shows, briefly and soberly. Do not invent regions that the detector does not name.",
}
CHAT_SYSTEM_PROMPTS: dict[Language, str] = {
    "zh": "你是一名图像取证助手，正在与用户讨论同一幅图像。回答须以检测证据和图像内容为依据，不确定时请直说。",
    "en": "You are an image forensics assistant talking with a user about one image. Lean on the detector's evidence "
    "and on what the image shows, and say so when you are not sure.",
}
QUESTIONS: dict[Language, tuple[str, ...]] = {
    "zh": (
        "{evidence}请说明该图像是否可信，逐个解释可疑区域，并给出结论。",
        "下面是对这张图片的检测结果。{evidence}请据此写一段取证说明：先给出结论，再说明依据与位置。",
        "检测结论为“{verdict}”，得分{score}。{regions}。请结合画面内容解释这一判断。",
    ),
    "en": (
        "{evidence} Explain whether this image can be trusted, go through the suspicious regions, and conclude.",
        "These are the findings about this image. {evidence} Write a short forensic statement: the conclusion first, "
        "then the reasons and where they are.",
        "The verdict is '{verdict}' with a score of {score}. Findings: {regions}. Explain it from what the image"
        " shows.",
    ),
}

_FIELD = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


def check_prompts(prompts: Sequence[str], num_images: int, where: str) -> None:
    """Refuse prompts that could not be filled in.

    Args:
        num_images: shown with each prompt; it may hold `<image>` that many times, or not at all.
        where: the key they come from, for the message.

    Raises:
        ConfigError: an unknown placeholder (with the known ones), another number of `<image>`, or a token that only the
            program may write.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise ConfigError(f"{where}: an empty prompt; write a question, or leave the key out")
        for match in _FIELD.finditer(prompt):
            if (name := match[2]) and name not in PLACEHOLDERS:
                near = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
                advice = f"did you mean {{{near[0]}}}? " if near else ""
                raise ConfigError(
                    f"{where}: unknown placeholder {{{name}}} in {prompt[:60]!r}; {advice}known: "
                    f"{', '.join(f'{{{known}}}' for known in PLACEHOLDERS)}; a literal one is {{{{{name}}}}}"
                )
        if found := program_token(prompt):
            raise ConfigError(f"{where}: the prompt holds {found}, which only the program may write")
        placed = prompt.count(IMAGE_PLACEHOLDER)
        if placed not in (0, num_images):
            raise ConfigError(
                f"{where}: {placed} {IMAGE_PLACEHOLDER} in {prompt[:60]!r}, but {num_images} images are shown "
                "(overlay_as_second_image adds one); write as many, or none to have them in front"
            )


def check_system(text: str | None, where: str) -> None:
    """Refuse a system prompt that would not be read as it is meant: nothing is filled into it, no image is in it.

    Raises:
        ConfigError: a placeholder of the evidence (or nearly one), an `<image>`, or a token that only the program may
            write.
    """
    if text is None:
        return
    for match in _FIELD.finditer(text):
        name = match[2] or match[1]
        if difflib.get_close_matches(name, PLACEHOLDERS, n=1):
            raise ConfigError(
                f"{where}: {match.group(0)} is not filled in there; the evidence goes into user_prompt or "
                "prompt_templates"
            )
    if found := IMAGE_PLACEHOLDER if IMAGE_PLACEHOLDER in text else program_token(text):
        raise ConfigError(f"{where} holds {found}, which only the program may write")


def literal_prompt(text: str) -> str:
    """A user's own words as a prompt in which nothing is a placeholder."""
    return re.sub(r"\{([A-Za-z_]\w*)\}", r"{{\1}}", text)


def choose_prompt(prompts: Sequence[str], seed: int, image_id: str) -> int:
    """Index of the prompt an image gets: drawn evenly by seed and id, whatever other images there are."""
    digest = hashlib.blake2b(f"{seed}\0{image_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % len(prompts)


def fill_prompt(prompt: str, evidence: Evidence, language: Language, num_images: int = 1) -> str:
    """A prompt with its placeholders filled in and an `<image>` for each image.

    Where it has none, the evidence stands before it, behind any images that it begins with.
    """
    if not any(match[2] for match in _FIELD.finditer(prompt)):
        images = re.match(rf"\s*(?:{re.escape(IMAGE_PLACEHOLDER)})*", prompt)
        start = images.end() if images else 0
        prompt = f"{prompt[:start]}{{evidence}}\n{prompt[start:]}"

    def value(match: re.Match[str]) -> str:
        return f"{{{match[1]}}}" if match[1] else PLACEHOLDERS[match[2]](evidence, language)

    text = _FIELD.sub(value, prompt)
    return text if IMAGE_PLACEHOLDER in text else IMAGE_PLACEHOLDER * num_images + text
