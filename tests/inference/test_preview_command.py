"""`forensics preview`: which settings are used, what the page says, when there is colour, and exit statuses."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.cli import build_parser, main
from finetune.config import DataConfig
from finetune.data.dataset import ForensicDataset
from finetune.data.preview import view_record
from finetune.data.readers import read_records
from finetune.data.storage import open_writer
from finetune.inference.preview import data_path, rendering, style_of, written_regions
from finetune.inference.preview_page import PreviewCard, card_html, preview_page
from finetune.models.loading import SETTINGS, load_vocabulary
from finetune.special_tokens import IGNORE_INDEX, SpecialTokens

TOKENS = SpecialTokens(1, 4)


@pytest.fixture(scope="module")
def dataset(saved_model: Path, photo_records: Path) -> ForensicDataset:
    processor, tokens, new_ids = load_vocabulary(saved_model)
    assert (tokens, new_ids) == (TOKENS, [])
    return ForensicDataset(read_records(photo_records), processor, tokens, DataConfig(template="en"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main(["preview", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class Spans(HTMLParser):
    """(class, ids, text) of the spans of every conversation on a page, and every URL."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.talks: list[list[tuple[str, str, str]]] = []
        self.urls: list[str] = []
        self._is_talk = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.urls += [values[name] for name in ("src", "href") if name in values]
        if tag == "pre":
            self._is_talk = True
            self.talks.append([])
        elif tag == "span" and self._is_talk:
            self.talks[-1].append((values.get("class", ""), values.get("title", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        self._is_talk &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._is_talk and self.talks[-1]:
            look, ids, text = self.talks[-1][-1]
            self.talks[-1][-1] = (look, ids, text + data)


# ---- the page ----


def test_page_colours_exactly_the_tokens_with_a_label(dataset: ForensicDataset) -> None:
    count = len(dataset)
    cards = []
    for index in range(count):
        view = view_record(dataset, index)
        cards.append(card_html(PreviewCard(view, written_regions(view, dataset)), index + 1, count))
    page = Spans(preview_page("t", cards))
    assert len(page.talks) == count
    for index, talk in enumerate(page.talks):
        ids: list[int] = []
        labels: list[int] = []
        for look, title, _ in talk:
            if " x " in title:
                token, times = map(int, title.split(" x "))
                own = [token] * times
            else:
                own = [int(part) for part in title.split(" + ")]
            ids += own
            labels += own if look in ("s", "f") else [IGNORE_INDEX] * len(own)
        assert ids == dataset[index].input_ids
        assert labels == dataset[index].labels


def test_page_needs_no_network_and_escapes_what_it_shows(dataset: ForensicDataset, tmp_path: Path) -> None:
    line = {"id": "<b>x", "messages": [{"role": "assistant", "content": "</pre><script>alert(1)</script>"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line), encoding="utf-8")
    evil = ForensicDataset(read_records(tmp_path / "a.jsonl"), dataset.processor, TOKENS, DataConfig())
    cards = [
        card_html(PreviewCard(view, written_regions(view, data)), 1, 1)
        for data in (evil, dataset)
        for view in [view_record(data, 0)]
    ]
    page = preview_page("<i>", cards)
    assert page.count("<script>") == 1
    assert "<b>" not in page
    assert all(url.startswith("data:image/") for url in Spans(page).urls)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
def test_regions_on_the_page_are_read_back_from_the_text(dataset: ForensicDataset, coordinates: Any) -> None:
    config = DataConfig(template="en", polygon_coordinates=coordinates)
    own = ForensicDataset(dataset.records, dataset.processor, TOKENS, config)
    by_id = {record.id: index for index, record in enumerate(own.records)}
    (region,) = written_regions(view_record(own, by_id["tampered_150x211"]), own)
    assert region is not None
    ((*points,),) = region
    xs, ys = zip(*points, strict=True)  # drawn at x 100..180, y 20..90 of 150x211
    assert (min(xs), min(ys), max(xs), max(ys)) == pytest.approx((100, 20, 180, 90), abs=1.1)
    assert written_regions(view_record(own, by_id["real_112x252"]), own) == [()]
    assert written_regions(view_record(own, by_id["text"]), own) == []
    first, second = written_regions(view_record(own, by_id["pair"]), own)
    assert (first, bool(second)) == ((), True)


def test_candidate_regions_are_drawn_as_they_are_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (120, 80), (90, 90, 90)).save(tmp_path / "a.png")
    regions = [
        {"id": "R1", "box_xyxy": [10, 20, 50, 60], "type": "crack"},
        {"id": "R2", "box_xyxy": [70, 20, 110, 60], "type": None},
    ]
    turns = [{"role": "user", "content": "<image><regions>"}, {"role": "assistant", "content": "{}"}]
    record = {"id": "a", "images": ["a.png"], "messages": turns, "provenance": {"regions": regions}}
    (tmp_path / "set.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert main(["preview", str(tmp_path / "set.jsonl"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r'src="data:image/jpeg;base64,([^"]+)" width="(\d+)" alt="candidate regions"', page)
    assert found is not None
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1])))).astype(int)
    scale = int(found[2]) / 120
    is_green = (drawn[..., 1] - drawn[..., 0] > 60) & (drawn[..., 1] - drawn[..., 2] > 40)
    rows, columns = np.nonzero(is_green)  # the solid box of the crack, and its label above
    assert (columns.min() / scale, columns.max() / scale, rows.max() / scale) == pytest.approx((10, 50, 60), abs=8)
    assert "solid with a defect" in page


# ---- settings ----


def test_a_trained_folder_brings_its_rendering(
    saved_model: Path, photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, photo_records, "--model", saved_model, "--id", "real_112x252", "--width", "500")
    assert status == 0
    assert f"as {saved_model} was trained" in out
    assert '⟦<cls><mask_1><mask_2><mask_3><mask_4>{"result": "real"' in out  # 4 mask tokens, English template
    for file in saved_model.iterdir():
        if file.name != SETTINGS and file.suffix != ".safetensors":  # no weights are read
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((saved_model / SETTINGS).read_text())
    settings |= {"layout": "text_first", "polygon_coordinates": "relative"}
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    arguments = build_parser().parse_args(["preview", str(photo_records), "--model", str(tmp_path)])
    data, _, tokens, template, _ = rendering(arguments)
    assert (data.layout, data.polygon_coordinates, tokens) == ("text_first", "relative", TOKENS)
    assert template is not None
    assert template.name == "en"


def test_a_configuration_renders_as_it_trains(
    tiny_dir: Path, photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tiny_dir}}}\ntokens: {{num_mask: 2}}\ndata: {{template: en, max_length: 40}}\n")
    status, out, _ = run(
        capsys, photo_records, "--config", config, "--set", "data.template=zh", "--id", "tampered_224x196", "--width",
        "300", "--html", tmp_path / "sub" / "page.html",
    )  # fmt: skip
    assert status == 1  # too long for this configuration: training would refuse it
    assert "<cls><mask_1><mask_2>{" in out
    assert "局部区域与周围不一致" in out
    assert "above data.max_length = 40" in out
    page = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert "局部区域与周围不一致" in re.sub(r"<[^>]*>", "", page)
    assert "above data.max_length = 40" in page


def test_a_template_without_tokens_is_said_first(
    photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], repo_root: Path
) -> None:
    text = (repo_root / "finetune/data/templates/en.yaml").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(text.replace("'{tokens}{{", "'{{"), encoding="utf-8")
    chosen = f"data.template={tmp_path / 'own.yaml'}"
    _, out, _ = run(capsys, photo_records, "--set", chosen, "--num", "1")
    assert "answers.tokens_first holds no forensic token" in out
    _, out, _ = run(capsys, photo_records, "--set", chosen, "heads.enabled=false", "--num", "1")
    assert "holds no forensic token" not in out


# ---- the terminal ----


class Terminal(io.StringIO):
    def __init__(self, is_tty: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self._is_tty, self._encoding = is_tty, encoding

    def isatty(self) -> bool:
        return self._is_tty

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLORTERM", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert style_of(Terminal(True), 70, False).depth == "256"
    assert style_of(Terminal(True), 70, False).width == 70
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert style_of(Terminal(True), None, False).depth == "truecolor"
    assert style_of(Terminal(True), None, True).depth == "none"
    assert style_of(Terminal(False), None, False).depth == "none"
    assert style_of(Terminal(True, "ascii"), None, False) == style_of(Terminal(False, "ascii"), None, False)
    assert style_of(Terminal(True, "ascii"), None, False).marks == ("[[", "]]")
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert style_of(Terminal(True), None, False).depth == "none"


def test_warnings_are_said_once_and_the_log_is_left_as_it_was(
    photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    line = {"id": "r", "image": str(photo_records.parent / "b.png"), "label": 0}
    answer = {"role": "assistant", "content": "fake <cls><mask_1> - <mask_32>"}
    (tmp_path / "a.jsonl").write_text(
        json.dumps({**line, "messages": [{"role": "user", "content": "<image>"}, answer]})
    )
    before = logging.getLogger("finetune").level
    _, out, _ = run(capsys, tmp_path / "a.jsonl", "--width", "200")
    assert out.count("gives its target away") == 1
    assert caplog.text == ""
    assert logging.getLogger("finetune").level == before


# ---- mistakes ----


def test_splits_of_a_folder(tmp_path: Path, photo_records: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    assert data_path(str(tmp_path), "train") == str(tmp_path / "train.json")
    assert data_path(str(tmp_path), "val") == str(tmp_path / "val")  # a stored set's, or an error of the reader
    assert data_path(str(photo_records), None) == str(photo_records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "a.yaml", "--model", "b"], ["give one of them"]),
        (["--split", "train"], ["--split train needs a folder"]),
        (["--id", "nobody"], ["no record with this id", "nobody"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--format", "nothing"], ["nothing"]),
        (["--option", "mask_convention"], ["--option 'mask_convention'", "KEY=VALUE"]),
        (["--option", "mask_convension=target"], ["unknown option", "write 'mask_convention'"]),
        (["--set", "data.templat=en"], ["unknown key 'data.templat'", "did you mean 'template'"]),
        (["--set", "data.max_polygon_tokens=80"], ["counts tokens of a model"]),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: list[str], photo_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, photo_records, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_options_reach_the_reader(photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "list.csv"
    table.write_text(f"bild;wahr\n{photo_records.parent / 'b.png'};nein\n", encoding="utf-8")
    options = ["columns={image_path: bild, label: wahr}", "label_map={nein: 0}"]
    status, out, err = run(capsys, table, "--option", *options, "--width", "200")
    assert (status, err) == (0, "")
    assert "image 1: 112x252" in out
    assert '"result": "real"' in out


@pytest.mark.parametrize("storage", ["jsonl", "parquet"])
def test_a_split_of_a_stored_set(
    photo_records: Path, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the images are inside a Parquet file."""
    for split in ("train", "test"):
        with open_writer(tmp_path / "set", split, storage) as writer:
            for record in read_records(photo_records):
                writer.write(record)
    status, out, err = run(
        capsys, tmp_path / "set", "--split", "test", "--id", "tampered_224x196", "--html", tmp_path / "p.html"
    )
    assert (status, err) == (0, f"wrote {tmp_path / 'p.html'}\n")
    assert "image 1: 224x196, seen at 224x196; label 1 tampered; mask 12.7" in out
    assert (tmp_path / "p.html").read_text(encoding="utf-8").count("<img src=") == 2


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, tmp_path / "no.jsonl")
    assert (status, out) == (2, "")
    assert "not found" in err
    assert err.count("\n") == 1


def test_rows_are_read_one_by_one_until_the_named_record(
    photo_records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set of a million records is not held in memory to look at one."""
    rows = iter(read_records(photo_records))
    monkeypatch.setattr("finetune.inference.preview.iter_records", lambda *_: rows)
    assert run(capsys, photo_records, "--id", "real_112x252")[0] == 0
    assert next(rows).id == "tampered_150x211"


def test_unreadable_rows_and_records_show_in_the_status(
    photo_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, photo_records, "--num", "99")[0] == 0
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "gone", "image": "no.png", "label": 0}\n{"id": 1.5}\n', encoding="utf-8")
    status, out, err = run(capsys, path, "--width", "300")
    assert status == 1
    assert "record 'gone' (bad.jsonl:1): image file not found" in out
    assert "bad.jsonl:2" in err
    assert "rows that cannot be read: 1;" in err
