"""`forensics tiny --corpus`: the tokenizer learns the words of a data set and still writes what it wrote before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.cli import main
from finetune.data.corpus import tokenizer_corpus
from finetune.models.tiny import train_tokenizer

ANSWER = "**风险描述**: 墙体开裂会继续发展并引起渗漏\n**风险等级**: 严重"


def test_the_words_of_a_data_set_take_fewer_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "said.jsonl"
    turns = [{"role": "user", "content": "写出报告"}, {"role": "assistant", "content": ANSWER}]
    lines = [json.dumps({"id": str(index), "messages": turns}) for index in range(60)]
    data.write_text("\n".join(lines) + "\n", "utf-8")
    assert main(["tiny", "--out", str(tmp_path / "tiny"), "--corpus", str(data)]) == 0
    plain, taught = train_tokenizer(tokenizer_corpus(), 1024), AutoTokenizer.from_pretrained(tmp_path / "tiny")
    ids = taught.encode(ANSWER, add_special_tokens=False)
    assert taught.decode(ids) == ANSWER
    assert 2 * len(ids) < len(plain.encode(ANSWER, add_special_tokens=False))
    capsys.readouterr()
    assert main(["tiny", "--out", str(tmp_path / "other"), "--corpus", str(tmp_path / "none.jsonl")]) == 2
    assert "data file not found" in capsys.readouterr().err
