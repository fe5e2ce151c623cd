"""Checks of the forensic tokens a conversation holds: spelled right, whole runs, each after the image it judges.

Nothing is repaired; `expanded` alone writes the shorthand out, as training does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune.errors import DataFormatError
from finetune.schema import Record
from finetune.special_tokens import IMAGE_PLACEHOLDER, SpecialTokens

_CHAT_TOKEN = re.compile(r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|vision_pad)\|>")
_MARKUP = re.compile(r"<\|[a-z_]+\|>")
_ABSURD_TOKEN = re.compile(r"<(?:cls|mask)_\d{5,}>")


def record_error(record: Record, problem: str, **details: str) -> DataFormatError:
    """An error that names a record and where it stands."""
    return DataFormatError(problem, record=record.id, source=record.source or None, **details)


def control_token(text: str) -> str:
    """The first control token of the chat format in a text, "" without one."""
    match = _CHAT_TOKEN.search(text)
    return match.group() if match else ""


def reserved(text: str) -> str:
    """What a text that is put into a rendered question or answer must not hold, and this one does; "" without it.

    An image, a forensic token and a control token each mean something beside the words: a place where a head reads, or
    the end of a turn.
    """
    token = SpecialTokens.find(text)
    return IMAGE_PLACEHOLDER if IMAGE_PLACEHOLDER in text else token[0].group() if token else control_token(text)


def program_token(text: str) -> str:
    """The first token in what somebody types that only the program may write: anything spelled like one of the chat
    format's, or a forensic token; "" without one."""
    match = _MARKUP.search(text) or next(iter(SpecialTokens.find(text)), None)
    return match.group() if match else ""


def expanded(text: str, tokens: SpecialTokens) -> str:
    """The shorthand written out, unless a slip of the keyboard asks for billions (`<mask_1> - <mask_999999999>`)."""
    return text if _ABSURD_TOKEN.search(text) else tokens.expand(text)


def leaking_tokens(record: Record, tokens: SpecialTokens) -> bool:
    """Whether a forensic token stands after assistant text, which a causal model has then read at the token.

    Text before the token counts wherever an earlier assistant turn or the same one holds it; whitespace, `<image>` and
    other forensic tokens do not count.
    """
    has_text = False
    for turn in record.turns:
        if turn.role != "assistant":
            continue
        end = 0
        content = expanded(turn.content, tokens)
        for match in tokens.find(content):
            has_text = has_text or bool(content[end : match.start()].replace(IMAGE_PLACEHOLDER, "").strip())
            if has_text:
                return True
            end = match.end()
        has_text = has_text or bool(content[end:].replace(IMAGE_PLACEHOLDER, "").strip())
    return False


def token_errors(record: Record, tokens: SpecialTokens, num_images: int) -> Iterable[DataFormatError]:
    """Misspelt and unknown tokens, runs that are not whole (over all assistant turns 0 or `num_images` of each kind),
    and runs that stand before the image they judge."""
    said = [turn.content for turn in record.turns if turn.role == "assistant"]
    misspelt = dict.fromkeys(token for content in said for token in tokens.misspelt(content))
    if misspelt and record.images:
        yield record_error(
            record,
            "misspelt forensic token, which the model would read as plain text",
            found=" ".join(list(misspelt)[:3]),
            expected=f"{_spelled(tokens.cls)} and {_spelled(tokens.mask)}, in ASCII and small letters",
            fix="correct the spelling, or leave the tokens out: they are put in by data.layout",
        )
        return
    unknown = list(dict.fromkeys(token for content in said for token in tokens.unknown(expanded(content, tokens))))
    order = _reading_order(record, tokens)
    found = [what for what in order if what != IMAGE_PLACEHOLDER]
    for kind, run in (("cls", tokens.cls), ("mask", tokens.mask)):
        bad = [token for token in unknown if token.startswith(f"<{kind}")]
        if bad:
            yield record_error(
                record,
                f"unknown {kind} token",
                found=" ".join(bad[:3]) + (" ..." if len(bad) > 3 else ""),
                expected=_spelled(run),
                fix=_unknown_token_fix(kind, bad, len(run)),
            )
            continue
        sequence = [token for token in found if token.startswith(f"<{kind}")]
        is_whole = sequence == list(run) * num_images
        if (
            is_whole
            and order.count(IMAGE_PLACEHOLDER) == len(record.images)
            and (early := _early_run(order, kind, run))
        ):
            yield record_error(
                record,
                f"the {kind} tokens of image {early} stand before it, where the model has not seen it",
                expected="each run behind its <image>",
                fix="move them into an answer that comes after the image",
            )
        if not sequence or is_whole:
            continue
        expected_count = num_images * len(run)
        expected = f"none, or {_spelled(run)} once for each of the {num_images} images ({expected_count} tokens)"
        if len(sequence) != expected_count:
            yield record_error(
                record,
                f"{len(sequence)} {kind} tokens for {num_images} images",
                found=_spelled(sequence),
                expected=expected,
                fix=f"write the whole run, or set tokens.num_{kind}",
            )
        else:
            at = next(k for k, token in enumerate(sequence) if token != run[k % len(run)])
            yield record_error(
                record,
                f"{kind} tokens out of order at number {at + 1}",
                found=sequence[at],
                expected=f"{run[at % len(run)]}; in all {expected}",
                fix="write each run in unbroken order",
            )


def _reading_order(record: Record, tokens: SpecialTokens) -> list[str]:
    """Images of a conversation, each as `<image>`, and forensic tokens of its answers, in the order a model reads."""
    order: list[str] = []
    for turn in record.turns:
        is_answer = turn.role == "assistant"
        content = expanded(turn.content, tokens) if is_answer else turn.content
        places = [(match.start(), match.group()) for match in (tokens.find(content) if is_answer else ())]
        places += [(match.start(), IMAGE_PLACEHOLDER) for match in re.finditer(IMAGE_PLACEHOLDER, content)]
        order += [what for _, what in sorted(places)]
    return order


def _early_run(order: Sequence[str], kind: str, run: Sequence[str]) -> int:
    """Number of the first image whose run of a kind begins before it, counted from 1; 0 where each comes after."""
    num_images = num_tokens = 0
    for what in order:
        if what == IMAGE_PLACEHOLDER:
            num_images += 1
        elif what.startswith(f"<{kind}"):
            if num_tokens // len(run) >= num_images:
                return num_tokens // len(run) + 1
            num_tokens += 1
    return 0


def missing_kind(record: Record, tokens: SpecialTokens) -> str:
    """`mask` or `cls` where a record holds tokens of the other kind alone, and a mask or a label to learn; else ""."""
    found = [match.group() for turn in record.turns for match in tokens.find(turn.content)]
    for kind, has_target in (
        ("mask", any(target.mask_path or target.polygons for target in record.targets if target.label != 0)),
        ("cls", any(target.label is not None for target in record.targets)),
    ):
        if found and has_target and not any(token.startswith(f"<{kind}") for token in found):
            return kind
    return ""


def _spelled(run: Sequence[str]) -> str:
    return "".join(run) if len(run) <= 3 else f"{run[0]}{run[1]}...{run[-1]}"


def _unknown_token_fix(kind: str, bad: list[str], num_known: int) -> str:
    """Which key of the configuration, or which spelling, makes the tokens known."""
    numbers = [token.rstrip(">").rpartition("_")[2] for token in bad if "_" in token]
    is_odd = [n for n in numbers if not n.isascii() or n.startswith("0") or len(n) > 4]
    if is_odd:
        return f"number the tokens <{kind}_1>, <{kind}_2>, ... without leading zeros"
    if not numbers:
        return f"write <cls_1> - <cls_{num_known}>, or set tokens.num_cls: 1"
    largest = max(map(int, numbers))
    if kind == "cls" and largest == 1:
        return "write <cls>, the spelling of a single token"
    return f"set tokens.num_{kind}: {largest}, or write " + (
        "<cls>" if num_known == 1 else f"<{kind}_1> - <{kind}_{num_known}>"
    )
