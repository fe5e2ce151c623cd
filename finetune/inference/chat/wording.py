"""What `forensics chat` says, in Chinese and English: verdict lines, notes, help. No model, no terminal."""

from __future__ import annotations

import locale
import os
from collections.abc import Sequence

from finetune.inference.chat.dialogue import ImageVerdict
from finetune.inference.chat.terminal import table

COMMANDS: dict[str, tuple[str, str, str]] = {
    "/image": ("PATH", "附上一张图像，随下一条消息发送", "attach an image to the next message"),
    "/mask": ("[PATH]", "保存最近一张图像的篡改区域叠加图", "save an overlay of the last image's mask"),
    "/score": ("", "列出对话中每张图像的判定与分数", "verdict and score of every image of the dialogue"),
    "/reset": ("", "清空对话与图像", "forget dialogue and images"),
    "/system": ("[TEXT]", "查看或设置系统提示词", "show or set the system prompt"),
    "/adapter": ("[NAME]", "列出模型或切换模型", "list the models or switch to one"),
    "/save": (
        "FILE",
        "把对话保存为 conversations 格式的 JSON",
        "save the dialogue as JSON in the conversations format",
    ),
    "/help": ("", "显示本帮助", "this list"),
    "/quit": ("", "退出（也可按 Ctrl-D）", "leave (or Ctrl-D)"),
}
"""Command -> (argument, Chinese, English)."""

_WORDS = {
    "real": ("真实", "real"),
    "fake": ("篡改", "tampered"),
    "score": ("分数", "score"),
    "area": ("区域", "area"),
    "says": ("注意：文字的结论是“{}”，与分数不一致", "note: the text says {}, unlike the score"),
    "no_heads": (
        "此模型没有训练过的判定头：只有文字，没有分数与掩膜",
        "this model has no trained heads: text only, no score and no mask",
    ),
    "no_verdict": ("还没有判定：先用 /image 附上图像并提问", "no verdict yet: attach an image with /image and ask"),
    "attached": ("已附上 {}（{}×{} 像素）", "attached {} ({}×{} pixels)"),
    "stopped": ("（已停止）", "(stopped)"),
    "empty": ("（空回答）", "(empty answer)"),
    "reset": ("对话已清空", "the dialogue is empty now"),
    "saved": ("已保存 {}", "saved {}"),
    "system": ("系统提示词：{}", "system prompt: {}"),
    "now": ("当前模型：{}", "now speaking: {}"),
    "hint": ("按 Ctrl-D 或输入 /quit 退出", "Ctrl-D or /quit leaves"),
    "welcome": (
        "{}：/image PATH 附上图像，然后提问；/help 查看全部命令",
        "{}: attach a picture with /image PATH, then ask; /help lists the commands",
    ),
}


def default_language() -> str:
    """`zh` where the system's locale is Chinese, else `en`."""
    name = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG")
    return "zh" if (name or locale.getlocale()[0] or "").lower().startswith("zh") else "en"


def say(key: str, language: str, *values: object) -> str:
    """One wording with its values filled in."""
    return _WORDS[key][0 if language == "zh" else 1].format(*values)


def help_text(language: str) -> str:
    """The commands in two aligned columns."""
    rows = [f"{name} {argument}".strip() for name, (argument, _, _) in COMMANDS.items()]
    width = max(map(len, rows))
    meanings = [zh if language == "zh" else en for _, zh, en in COMMANDS.values()]
    return "\n".join(f"  {row.ljust(width)}  {meaning}" for row, meaning in zip(rows, meanings, strict=True))


def label_word(label: int, language: str) -> str:
    """The word for 0 (real) or 1 (tampered)."""
    return say("fake" if label else "real", language)


def verdict_line(verdict: ImageVerdict, name: str, mask_threshold: float, language: str) -> str:
    """`[1] photo.jpg  tampered  score 0.973  area 4.2 %`."""
    return "  ".join(filter(None, _cells(verdict, name, mask_threshold, language)))


def score_table(verdicts: Sequence[tuple[str, ImageVerdict]], mask_threshold: float, language: str) -> str:
    """The same for several images, aligned by display width.

    Args:
        verdicts: name of each image and what was said about it.
    """
    return table([_cells(verdict, name, mask_threshold, language) for name, verdict in verdicts])


def _cells(verdict: ImageVerdict, name: str, mask_threshold: float, language: str) -> tuple[str, str, str, str]:
    label, score, area = "", "", ""
    if verdict.score is not None and verdict.label is not None:
        label, score = label_word(verdict.label, language), f"{say('score', language)} {verdict.score:.3f}"
    if verdict.mask_scores is not None:
        share = 100 * float((verdict.mask_scores >= mask_threshold).mean())
        area = f"{say('area', language)} {share:.1f} %"
    return f"[{verdict.image + 1}] {name}", label, score, area
