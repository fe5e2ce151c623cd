"""Dialogues: verdict first, then streamed text; history, switching, saving; commands; a real process on a terminal."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.cli import build_parser, main
from finetune.config import GenerationConfig, ModelConfig
from finetune.data.readers import read_records
from finetune.data.template import load_template
from finetune.data.validation import check_records
from finetune.errors import ConfigError, DataFormatError, ModelLoadError
from finetune.inference.chat.command import ChatLoop
from finetune.inference.chat.contestants import contestants
from finetune.inference.chat.dialogue import Speaker
from finetune.inference.chat.script import dialogue_of
from finetune.inference.chat.session import ChatSession, place_images
from finetune.inference.chat.terminal import StreamWrapper, display_width, fit, pad, table
from finetune.inference.chat.wording import COMMANDS, help_text
from finetune.inference.predictor import Predictor
from finetune.inference.queries import Query
from finetune.models.loading import load_bundle
from finetune.schema import ImageInput, Turn
from finetune.special_tokens import SpecialTokens

SETTINGS = GenerationConfig(max_new_tokens=12)


@pytest.fixture(scope="module")
def talkative(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved model, made to talk until its limit: small rows make blanks and special tokens unlikely. Read only."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(saved_model, tmp_path_factory.mktemp("chat") / "talkative"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    rows = range(len(weights["model.embed_tokens.weight"]))  # spare rows decode to nothing
    blank = [token for token in rows if not tokenizer.decode([token], skip_special_tokens=True).strip()]
    weights["model.embed_tokens.weight"][blank] *= 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def speaker(talkative: Path) -> Speaker:
    return Speaker(load_bundle(ModelConfig(path=str(talkative))), SETTINGS)


@pytest.fixture(scope="module")
def adapter_dir(talkative: Path, make_adapter: Callable[[Path, str, float], Path]) -> Path:
    """An adapter on the talkative model, its heads moved; read only."""
    return make_adapter(talkative, "chat", 0.05)


@pytest.fixture
def photos(photo_records: Path) -> list[ImageInput]:
    return [ImageInput(path=str(photo_records.parent / f"{name}.png")) for name in "abc"]


def ask(images: list[ImageInput], *contents: str, system: str | None = None) -> Query:
    """A dialogue of alternating user and assistant turns."""
    roles = ("user", "assistant")
    turns = [Turn(roles[i % 2], content) for i, content in enumerate(contents)]  # type: ignore[arg-type]
    return Query("q", tuple(images), (*([Turn("system", system)] if system else []), *turns))


def models_of(*arguments: str) -> Any:
    return contestants(build_parser().parse_args(["chat", "--max-new-tokens", "8", *arguments]))


# ---- the speaker ----


def test_verdict_comes_before_the_text_and_the_stream_is_the_answer(speaker: Speaker, photos: Any) -> None:
    events: list[Any] = []
    (reply,) = speaker.answer(
        [ask(photos[:1], "<image>real or fake?")], on_verdicts=events.append, on_text=lambda t: events.append(t)
    )
    assert isinstance(events[0], tuple)
    assert all(isinstance(event, str) for event in events[1:])
    assert "".join(events[1:]).strip() == reply.text
    assert len(reply.text) > 3
    (verdict,) = reply.verdicts
    assert events[0][0].score == verdict.score
    (expected,) = next(iter(Predictor(speaker.bundle, SETTINGS).predict([ask(photos[:1], "<image>real or fake?")])))
    assert verdict.score == pytest.approx(expected.score, abs=1e-5)
    np.testing.assert_allclose(verdict.mask_scores, expected.mask_scores, atol=1e-5)
    assert reply.text == expected.text
    assert reply.content == speaker.bundle.tokens.run + reply.text


@pytest.mark.parametrize("layout", ["tokens_first", "text_first"])
def test_only_new_images_are_judged_and_earlier_turns_are_kept(speaker: Speaker, photos: Any, layout: str) -> None:
    own = Speaker(speaker.bundle, SETTINGS, layout=layout)
    first = own.answer([ask(photos[:1], "<image>first?")])[0]
    assert [verdict.image for verdict in first.verdicts] == [0]
    second = own.answer([ask(photos[:1], "<image>first?", first.content, "why?")])[0]
    assert second.verdicts == ()
    assert second.parse_ok is None
    third = own.answer([ask(photos, "<image>first?", first.content, "why?", second.content, "<image> and <image>?")])[0]
    assert [verdict.image for verdict in third.verdicts] == [1, 2]
    assert [verdict.size_hw for verdict in third.verdicts] == [(112, 252), (150, 211)]
    for verdict in third.verdicts:
        assert verdict.mask_scores is not None
        assert verdict.mask_scores.shape == verdict.size_hw
    if layout == "tokens_first":
        # the second image's score depends on the dialogue before it, the first image's never on what came after
        changed = own.answer(
            [ask(photos, "<image>first?", first.content, "why?", "other words", "<image> and <image>?")]
        )
        assert changed[0].verdicts[0].score != third.verdicts[0].score


def test_a_batch_of_dialogues_equals_them_one_by_one(speaker: Speaker, photos: Any) -> None:
    run = speaker.bundle.tokens.run
    dialogues = [
        ask(photos[:1], "<image>a?"),
        ask(photos[:2], "<image>a?", f"{run}yes", "<image>b?"),
        ask(photos[:1], "<image>a?", f"{run}yes", "why?"),
        ask([], "What is metadata?"),
    ]
    together = speaker.answer(dialogues)
    for query, found in zip(dialogues, together, strict=True):
        (alone,) = speaker.answer([query])
        assert alone.text == found.text
        assert [v.image for v in alone.verdicts] == [v.image for v in found.verdicts]
        for a, b in zip(alone.verdicts, found.verdicts, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)
            np.testing.assert_allclose(a.mask_scores, b.mask_scores, atol=1e-5)


def test_stopping_keeps_what_was_written(speaker: Speaker, photos: Any) -> None:
    pieces: list[str] = []
    (reply,) = speaker.answer(
        [ask(photos[:1], "<image>real or fake?")], on_text=pieces.append, should_stop=lambda: len("".join(pieces)) > 4
    )
    (whole,) = speaker.answer([ask(photos[:1], "<image>real or fake?")])
    assert reply.is_stopped
    assert not whole.is_stopped
    assert whole.text.startswith(reply.text)
    assert len(reply.text) < len(whole.text)


def test_a_plain_base_has_no_verdict_and_reads_no_forensic_token(
    tiny_dir: Path, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heads would be new: numbers like any others, that mean nothing."""
    models = models_of("--model", f"plain={tiny_dir}")
    base = models.speaker("plain")
    seen: list[Any] = []
    original = Speaker._inputs

    def spy(self: Speaker, samples: Any) -> Any:
        seen.extend(sample.input_ids for sample in samples)
        return original(self, samples)

    monkeypatch.setattr(Speaker, "_inputs", spy)
    verdicts: list[Any] = []
    (reply,) = base.answer([ask(photos[:1], "<image>real?")], on_verdicts=verdicts.append)
    assert not base.has_heads
    assert verdicts == []
    assert [(v.score, v.label, v.mask_scores) for v in reply.verdicts] == [(None, None, None)]
    text = base.bundle.tokenizer.decode(seen[0])
    assert "<cls>" not in text
    assert "<mask_1>" not in text
    untouched = load_file(tiny_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(base.bundle.base.get_input_embeddings().weight, untouched)
    new_heads = Speaker(load_bundle(ModelConfig(path=str(tiny_dir))), SETTINGS)
    assert not new_heads.has_heads
    assert new_heads.answer([ask(photos[:1], "<image>real?")])[0].verdicts[0].score is None


# ---- the session ----


def quiet(session: ChatSession, text: str) -> Any:
    return session.ask(text, on_verdicts=lambda _: None, on_text=lambda _: None, should_stop=lambda: False)


def test_switching_models_keeps_the_dialogue_and_leaves_no_trace(
    talkative: Path, adapter_dir: Path, photos: Any
) -> None:
    """A, then B on the same dialogue, then A again: A answers as if B had never spoken."""
    models = models_of("--model", f"base={talkative}", "--adapter", f"A={adapter_dir}")
    session = ChatSession(models)
    assert session.current == "A"
    session.attach(photos[0].path or "")
    first = quiet(session, "real?")
    session.reset()
    session.switch("base")
    session.attach(photos[0].path or "")
    other = quiet(session, "real?")
    assert other.verdicts[0].score != first.verdicts[0].score
    quiet(session, "why?")
    session.switch("A")
    quiet(session, "what do you say?")  # reads the base's answers with its own tokens
    session.reset()
    session.attach(photos[0].path or "")
    again = quiet(session, "real?")
    assert again.text == first.text
    assert again.verdicts[0].score == pytest.approx(first.verdicts[0].score, abs=1e-7)
    np.testing.assert_allclose(again.verdicts[0].mask_scores, first.verdicts[0].mask_scores, atol=1e-7)
    assert models.speaker("A").bundle.base.model.visual.patch_embed.proj.weight is (
        models.speaker("base").bundle.base.model.visual.patch_embed.proj.weight
    )


@pytest.mark.parametrize("name", ["dialogue.json", "dialogue.jsonl"])
def test_a_saved_dialogue_is_a_record_of_the_users_format(
    talkative: Path, photos: Any, tmp_path: Path, name: str
) -> None:
    session = ChatSession(models_of("--merged", f"m={talkative}"), system="你是鉴定员")
    shutil.copy(photos[0].path or "", tmp_path / "一.png")
    session.attach(f'"{tmp_path}/一.png"')
    first = quiet(session, "这张图片<image>是真的吗？")
    quiet(session, "why?")
    session.attach(photos[1].path or "")
    quiet(session, "and this one?")
    path = session.save(str(tmp_path / name))
    (record,) = read_records(path)
    assert [turn.role for turn in record.turns] == ["system", *["user", "assistant"] * 3]
    assert record.turns[2].content == first.content
    assert Path(record.images[0].path or "").name == "一.png"
    assert json.loads(path.read_text().splitlines()[0] if name.endswith("l") else path.read_text())
    assert check_records([record], session.speaker.bundle.tokens) == []
    dialogue = dialogue_of(record, load_template("zh"))
    assert [question.text for question in dialogue.questions] == [
        "这张图片<image>是真的吗？", "why?", "<image>and this one?",
    ]  # fmt: skip


def test_a_dialogue_without_heads_is_saved_without_tokens(tiny_dir: Path, photos: Any, tmp_path: Path) -> None:
    session = ChatSession(models_of("--model", f"plain={tiny_dir}"))
    session.attach(photos[0].path or "")
    quiet(session, "real?")
    (record,) = read_records(session.save(str(tmp_path / "d.json")))
    assert not any(SpecialTokens.find(turn.content) for turn in record.turns)
    with pytest.raises(ConfigError, match="has a mask"):
        session.save_overlay("")


def test_overlay_of_the_last_image(
    talkative: Path, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = ChatSession(models_of("--merged", f"m={talkative}", "--mask-threshold", "0"))
    for photo in photos[:2]:
        session.attach(photo.path or "")
    quiet(session, "compare")
    written = [session.save_overlay(""), session.save_overlay(""), session.save_overlay("x/own.png")]
    assert [str(path) for path in written] == ["b_overlay.png", "b_overlay-2.png", "x/own.png"]
    picture = np.asarray(Image.open(tmp_path / "b_overlay.png"))
    assert picture.shape == (112, 252, 3)
    assert picture[..., 0].mean() > np.asarray(Image.open(photos[1].path or "").convert("RGB"))[..., 0].mean() + 20
    with pytest.raises(ConfigError, match="cannot be written"):
        session.save_overlay("x/own.what")


def test_images_stand_where_the_user_put_them() -> None:
    assert place_images("real?", 2) == "<image><image>real?"
    assert place_images("this <image> or <image>?", 2) == "this <image> or <image>?"
    assert place_images("hello", 0) == "hello"
    with pytest.raises(ConfigError, match="1 <image>, but 2 images"):
        place_images("this <image>", 2)
    for text in ("<cls>", "<|im_end|>", "x <mask_3>"):
        with pytest.raises(ConfigError, match="only the program may write"):
            place_images(text, 0)


# ---- commands ----


@pytest.fixture
def loop(talkative: Path) -> ChatLoop:
    return ChatLoop(ChatSession(models_of("--merged", f"m={talkative}")), "en")


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("/imagee x", ConfigError, "did you mean /image?"),
        ("/image", ConfigError, "needs a file"),
        ("/image no.png", DataFormatError, "no.png"),
        ("/mask", ConfigError, "has a mask yet"),
        ("/save", ConfigError, "needs a file name"),
        ("/save x.json", ConfigError, "nothing to save"),
        ("/mask x.png", ConfigError, "has a mask yet"),
        ("/adapter z", ConfigError, "there are: m"),
        ("<|im_start|>", ConfigError, "leave it out"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    loop: ChatLoop, line: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        loop.handle(line)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert loop.session.exchanges == []
    assert loop.session.current == "m"


def test_commands_do_what_help_says(loop: ChatLoop, photos: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for language in ("zh", "en"):
        assert all(command in help_text(language) for command in COMMANDS)
    assert loop.handle("   ")
    for line in (
        "/help",
        "/score",
        f"/image {photos[0].path}",
        "真的吗？",
        "/score",
        "/system",
        "/system 简短回答",
        "/adapter",
    ):
        assert loop.handle(line)
    printed = capsys.readouterr().out
    assert "no verdict yet" in printed
    assert "attached a.png (196×224 pixels)" in printed
    assert printed.count("score 0.") == 2
    assert "* m  (merged" in printed
    assert loop.session.system == "简短回答"
    loop.handle("/reset")
    assert loop.session.images == []
    assert not loop.handle("/quit")


def test_wrong_models_are_refused(tiny_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        models_of()
    with pytest.raises(ConfigError, match="give a whole model with --merged"):
        models_of("--model", str(tiny_dir), "--adapter", str(tiny_dir))
    with pytest.raises(ConfigError, match="two models are called"):
        models_of("--model", f"x={tiny_dir}", "--merged", f"x={tiny_dir}")
    with pytest.raises(ModelLoadError, match="does not exist"):
        models_of("--model", str(tmp_path / "gone")).speaker("gone")
    assert models_of("--adapter", str(adapter_dir)).names == ["base", "adapter"]
    assert models_of("--model", str(adapter_dir)).default == "adapter"
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    assert models_of("--merged", str(best)).names == ["run/best"]


def test_options_that_need_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", "m", "--out", "x.jsonl"]) == 2
    assert "--out goes with --script" in capsys.readouterr().err
    assert main(["chat", "--model", "m", "--script", "x.jsonl"]) == 2
    assert "--script needs --out" in capsys.readouterr().err


# ---- display width ----


def test_display_width() -> None:
    assert display_width("abc") == 3
    assert display_width("真伪ab，") == 8
    assert display_width("e\u0301") == 1
    assert fit("真伪鉴定", 5) == "真伪…"
    assert fit("ab", 5) == "ab"
    assert display_width(pad("真", 6)) == 6
    lines = table([("图", "1.0"), ("abcd", "10.25")]).splitlines()
    assert [display_width(line) for line in lines] == [11, 11]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_streamed_text_is_wrapped_by_width(pieces: int) -> None:
    """However it comes in pieces: no line is too wide, no word is cut, no line begins with a comma, nothing is lost."""
    text = (
        '{"result": "fake", "evidence": "画面右下角的文字边缘过于锐利，与周围的噪声不一致。"} supercalifragilistic end'
    )
    written: list[str] = []
    wrapper = StreamWrapper(written.append, 24, indent="  ")
    for start in range(0, len(text), pieces):
        wrapper.feed(text[start : start + pieces])
    wrapper.close()
    lines = "".join(written).splitlines()
    assert max(map(display_width, lines)) <= 24
    assert all(line.startswith("  ") for line in lines)
    assert not any(line.strip()[0] in "，。" for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert any("supercalifragilistic" in line for line in lines)


# ---- a real process on a real terminal ----


class Terminal:
    """A program on a pseudo terminal of 60 columns that controls it: Ctrl-C arrives as a signal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        root = Path(__file__).resolve().parents[3]
        environment = {
            **os.environ,
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("COLUMNS", None)  # what the tests' own terminal says would win over the pseudo terminal's size
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune.cli", *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""
        self._read_to = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press_until(self, key: str, text: str) -> str:
        """A key again and again: readline shows its prompt a moment before it listens, longer on a loaded machine."""
        for _ in range(60):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, seconds=1.5)
        raise AssertionError(f"{text!r} did not appear")

    def wait_for(self, text: str, seconds: float = 90) -> str:
        """Output since the last call up to and including `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen[self._read_to :]:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not appear in: {self.seen[self._read_to :]!r}"
            if select.select([self.master], [], [], min(left, 0.5))[0]:
                try:
                    self.seen += self._decoder.decode(os.read(self.master, 4096))
                except OSError:  # the program has ended
                    raise AssertionError(f"ended without {text!r}: {self.seen[self._read_to :]!r}") from None
        position = self.seen.index(text, self._read_to) + len(text)
        found, self._read_to = self.seen[self._read_to : position], position
        return found

    def end(self) -> int:
        """Exit status."""
        try:
            return self.process.wait(timeout=120)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
            os.close(self.master)


@pytest.mark.slow
def test_a_chat_on_a_terminal(talkative: Path, adapter_dir: Path, photos: Any, tmp_path: Path) -> None:
    shutil.copy(photos[0].path or "", tmp_path / "照片.png")
    terminal = Terminal(
        "chat", "--model", f"base={talkative}", "--adapter", f"甲={adapter_dir}",
        "--max-new-tokens", "100000", "--language", "zh", cwd=tmp_path,
    )  # fmt: skip
    terminal.wait_for("甲> ")
    terminal.type("/image 照片.png\n")
    terminal.wait_for("已附上 照片.png（196×224 像素）")
    terminal.wait_for("甲 +照片.png> ")
    terminal.press_until("\x03", "Ctrl-D")  # at the prompt: a hint, and the program goes on
    terminal.wait_for("甲 +照片.png> ")
    terminal.type("请分析这张图片\n")
    verdict = terminal.wait_for("区域 ")
    assert "[1] 照片.png" in verdict
    assert "分数 0." in verdict
    terminal.wait_for("\n")
    terminal.wait_for("\n")  # a whole line of the answer was streamed, and the model is far from its limit
    terminal.type("\x03")  # stops the answer
    answer = terminal.wait_for("（已停止）")
    lines = answer.replace("\r", "").replace("^C", "").split("\n")  # the terminal itself echoes ^C
    assert max(map(display_width, lines)) <= 60
    terminal.wait_for("甲> ")
    terminal.type("/nonsense\n")
    assert "error: no command /nonsense" in terminal.wait_for("/help lists the commands")
    terminal.type("/mask 叠加.png\n")
    terminal.wait_for("已保存 叠加.png")
    terminal.type("/adapter base\n")
    terminal.wait_for("base> ")
    terminal.type("/save 对话.json\n")
    terminal.wait_for("已保存 对话.json")
    terminal.wait_for("base> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen
    assert Image.open(tmp_path / "叠加.png").size == (196, 224)
    (record,) = read_records(tmp_path / "对话.json")
    assert record.turns[0].content == "<image>请分析这张图片"


@pytest.mark.slow
def test_lines_from_a_pipe(talkative: Path, photos: Any) -> None:
    """Without a terminal: questions from a file, the end of the input ends the program."""
    lines = f"/image {photos[0].path}\nreal?\n/score\n"
    result = subprocess.run(
        [sys.executable, "-m", "finetune.cli", "chat", "--merged", f"m={talkative}", "--max-new-tokens", "5",
         "--language", "en"],
        input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout.count("score 0.") == 2
    assert "Traceback" not in result.stderr
