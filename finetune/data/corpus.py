"""The project's own prompts and answers as plain text, for training the tiny model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune.data.chat import polygon_text, segments
from finetune.data.readers import read_records
from finetune.data.synthesis.answers import LANGUAGES, phrases
from finetune.data.template import load_template
from finetune.schema import Turn


def conversation_texts(paths: Sequence[str]) -> Iterator[str]:
    """What is said in the conversations of data sets, turn by turn, in order.

    Raises:
        DataFormatError: a record that cannot be read.
    """
    for path in paths:
        for record in read_records(path):
            yield from (turn.content for turn in record.turns)


def tokenizer_corpus() -> list[str]:
    """Chat-formatted prompts and answers of every built-in template, and every evidence sentence in both languages."""
    texts: list[str] = []
    for language in LANGUAGES:
        template = load_template(language)
        sentences = [*phrases(language), *template.evidence.values()]
        for layout, answer in template.answers.items():
            for sentence in sentences:
                for word in template.result.values():
                    content = answer.format(
                        tokens="", cls="", mask_tokens="", result=word, evidence=sentence,
                        mask=polygon_text([((12, 34), (56, 78), (190, 203))]),
                    )  # fmt: skip
                    texts.append(content)
                if layout == "tokens_first":
                    texts.append(sentence)
        for prompt in (*template.prompts, *template.prompts_multi):
            texts += [
                piece.text for piece in segments((Turn("user", prompt),), template.system, for_generation=True)
            ] * 20
    return texts
