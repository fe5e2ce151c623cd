"""With the real Qwen2.5-VL tokenizer: ids, padded matrices that keep their size, the official chat template, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from finetune.data.chat import encode, segments
from finetune.data.template import load_template
from finetune.errors import ModelLoadError
from finetune.models.loading import add_forensic_tokens, grow_embeddings, load_processor
from finetune.models.tiny import TinyShape, tiny_config
from finetune.schema import Turn
from finetune.special_tokens import SpecialTokens

pytestmark = pytest.mark.real_data
TOKENS = SpecialTokens()
SYSTEM = "You are a helpful assistant."
ANSWER_ZH = TOKENS.run + '{"result": "fake", "mask": [[12, 345], [6, 78]], "evidence": "发际线羽化异常，噪声不一致"}'
ANSWER_EN = '{"result": real<cls>, "mask": []' + "".join(TOKENS.mask) + "}"


@pytest.fixture(scope="module")
def real_folder(shared_data: Path) -> Path:
    return shared_data / "qwen2_5_vl_processor"


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert len(tokenizer) == 151665
    assert add_forensic_tokens(tokenizer, TOKENS) == list(range(151665, 151698))
    return tokenizer


def test_tokens_take_the_next_ids_and_stay_whole(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(list(TOKENS.all)) == list(range(151665, 151698))
    text = f"real<cls>, {TOKENS.run}。"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= 151665] == [151665, *range(151665, 151698)]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "real, 。"
    assert add_forensic_tokens(tokenizer, TOKENS) == []  # a second time adds nothing


def test_a_vocabulary_that_grew_gets_only_what_is_missing(real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    add_forensic_tokens(tokenizer, SpecialTokens(num_mask=4))
    assert add_forensic_tokens(tokenizer, SpecialTokens(num_mask=6)) == [151670, 151671]


def test_token_that_is_split_is_refused(real_folder: Path) -> None:
    """A normalising added token of another tool would never be found in `input_ids` as one id."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    tokenizer.convert_tokens_to_ids = lambda tokens: [151643 for _ in tokens]
    with pytest.raises(ModelLoadError, match="one id each"):
        add_forensic_tokens(tokenizer, TOKENS)


class Matrices(nn.Module):
    """Embedding and lm_head with the released numbers of rows and a width of 4."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, 4)
        self.head = nn.Linear(4, rows, bias=False)
        self.resized: list[int] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def resize_token_embeddings(self, *arguments: Any, **_: Any) -> None:
        self.resized.append(arguments[0])


@pytest.mark.parametrize("rows", [151936, 152064])
def test_released_matrices_keep_their_rows(rows: int) -> None:
    model = Matrices(rows)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ids = list(range(151665, 151698))
    grow_embeddings(model, 151698, ids)  # type: ignore[arg-type]
    assert not model.resized
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.shape == (rows, 4)
        assert (old != new).any(dim=1).nonzero().flatten().tolist() == ids
        fresh = new[ids]
        known = old[:151665]
        assert float((fresh.mean(dim=0) - known.mean(dim=0)).abs().max()) < 0.1
        assert 0.05 < float(fresh.std(dim=0).mean() / known.std(dim=0).mean()) < 0.2
        assert len(torch.unique(fresh, dim=0)) == 33


def test_matrix_that_is_too_small_grows_to_a_multiple_of_64(tiny_dir: Path) -> None:
    """And only then; old rows keep their bits, the new ones are initialised, tied matrices stay tied."""
    from finetune.models.qwen_forensics_model import QwenForensicsForConditionalGeneration

    for vocabulary, expected in [(704, 704), (705, 768), (768, 768)]:
        model = QwenForensicsForConditionalGeneration.from_pretrained(tiny_dir, heads={"enabled": False})
        old = model.get_input_embeddings().weight.detach().clone()
        assert old.shape[0] == 704
        grow_embeddings(model, vocabulary, [vocabulary - 1])
        new = model.get_input_embeddings().weight
        assert new.shape[0] == expected == model.config.text_config.vocab_size
        assert model.get_output_embeddings().weight is new
        untouched = [row for row in range(704) if row != vocabulary - 1]
        assert torch.equal(new[untouched], old[untouched])
        assert 0 < float(new[vocabulary - 1].abs().max()) < 0.1


CONVERSATIONS = {
    "text_en": [("user", "Which metadata matter?"), ("assistant", "Camera, date; software's name.")],
    "text_zh": [
        ("user", "这张证件照是否存在PS痕迹？"),
        ("assistant", "伪造区域: 发际线；取证难易判断: 易。\n\n结论：伪造"),
    ],
    "image_zh": [("user", "请分析下面这张图片的真伪<image>, 用json格式输出"), ("assistant", ANSWER_ZH)],
    "text_first": [("user", "<image>Real?"), ("assistant", ANSWER_EN)],
    "multi_turn": [
        ("system", "You inspect images.\n  Be brief."),
        ("user", "<image><image>两张图片有什么区别"),
        ("assistant", "前一张是真实图像, 后一张图像是伪造图像 "),
        ("user", "  why?\n"),
        ("assistant", ANSWER_ZH),
    ],
    "image_in_answer": [("assistant", "<image>是一张真实图像，<image>是拼接类型的伪造图像")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_official_chat_template(tokenizer: Any, name: str) -> None:
    turns = tuple(Turn(role, text) for role, text in CONVERSATIONS[name])  # type: ignore[arg-type]
    counts = [7, 3][: sum(turn.content.count("<image>") for turn in turns)]
    ours, labels = encode(segments(turns, SYSTEM), tokenizer, counts)
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for index, text in enumerate(turn.content.split("<image>")):
            parts += [{"type": "image"}] * bool(index) + ([{"type": "text", "text": text}] if text else [])
        messages.append({"role": turn.role, "content": parts})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = text.split("<|image_pad|>")
    for count, piece in zip(counts, pieces[1:], strict=True):
        pieces[0] += "<|image_pad|>" * count + piece
    assert ours == tokenizer.encode(pieces[0])
    assert len(labels) == len(ours)
    assert all(label in (-100, token) for label, token in zip(labels, ours, strict=True))
    supervised = tokenizer.decode([label for label in labels if label != -100])
    answers = [turn.content.replace("<image>", "") for turn in turns if turn.role == "assistant"]
    assert supervised == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert supervised.count("<|im_end|>") == len(answers) > 0


@pytest.mark.parametrize("name", ["text_zh", "image_zh", "multi_turn"])
def test_labels_are_the_generation_mask_of_a_marked_template(tokenizer: Any, name: str) -> None:
    """The `{% generation %}` way of transformers and TRL, on text that has one image token per image."""
    marked = (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}"
        "{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    turns = tuple(Turn(role, text) for role, text in CONVERSATIONS[name])  # type: ignore[arg-type]
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    messages = [{"role": turn.role, "content": turn.content.replace("<image>", block)} for turn in turns]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=marked, system=SYSTEM, return_dict=True, return_assistant_tokens_mask=True
    )
    ours, labels = encode(segments(turns, SYSTEM), tokenizer, [1, 1])
    assert ours == theirs["input_ids"]
    assert [int(label != -100) for label in labels] == theirs["assistant_masks"]


def test_answer_that_begins_with_a_line_break_is_split_as_in_generation(tokenizer: Any) -> None:
    """The one difference to the whole text's ids: there the break joins the header's; a model never generates that."""
    turns = (Turn("user", "?"), Turn("assistant", "\nYes"))
    ours, labels = encode(segments(turns, SYSTEM), tokenizer, [])
    prompt, _ = encode(segments(turns[:1], SYSTEM, for_generation=True), tokenizer, [])
    assert ours[: len(prompt)] == prompt
    assert tokenizer.decode([label for label in labels if label != -100]) == "\nYes<|im_end|>"


def test_prompt_for_generation_is_the_official_one(tokenizer: Any) -> None:
    turns = (Turn("user", "<image>?"),)
    ours, labels = encode(segments(turns, SYSTEM, for_generation=True), tokenizer, [1])
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ours) == text
    assert set(labels) == {-100}


def test_official_processor_with_the_pil_backend(real_folder: Path) -> None:
    processor = load_processor(real_folder, min_pixels=3136, max_pixels=50176)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert processor.image_processor.size["longest_edge"] == 50176


def test_tiny_tokenizer_behaves_like_the_real_one(tokenizer: Any, tiny_dir: Path) -> None:
    """Same special tokens, same pre-tokenisation: single digits, no merge across lines; padded rows to spare."""
    tiny = AutoTokenizer.from_pretrained(tiny_dir)
    for text in ("(100,200),(300,400)", "图像 real<|im_end|>\n<|im_start|>user\nfake", "It's 3.14  times!\n\nEnd"):
        assert tiny.decode(tiny.encode(text)) == text
        assert [p for p, _ in tiny.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [
            p for p, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ]
    for token in ("<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"):
        assert len(tiny.encode(token)) == 1 == len(tokenizer.encode(token))
    assert (tiny.eos_token, tiny.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    rows = tiny_config(tiny, TinyShape()).text_config.vocab_size
    assert rows % 64 == 0
    assert rows >= len(tiny) + 33


def test_templates_name_the_official_system_prompt() -> None:
    assert {load_template(name).system for name in ("zh", "en")} == {SYSTEM}
