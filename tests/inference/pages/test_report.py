"""The report: one file, nothing from outside, data escaped, bounded size, a dash for what is missing; console table."""

from __future__ import annotations

import html.parser
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from finetune.inference.pages.cards import TOTAL_IMAGE_BYTES, cards_html
from finetune.inference.pages.charts import histogram, roc_points, thin, ticks, training_charts
from finetune.inference.pages.markup import DASH, format_number, format_seconds
from finetune.inference.pages.report import ReportSample, format_table, render_report
from finetune.inference.pages.table import ONLY_WHERE_PRESENT, ROWS, display_width, metric_rows

METRICS = {
    "image": {"auroc": 0.93, "f1": 0.8, "ece": 0.07, "n_real": 120, "n_fake": 118},
    "localization": {"f1": 0.587, "iou": math.nan, "n": 118},
    "authentic": {"false_alarm_rate": 0.117},
    "text": {"parse_rate": None},
    "baselines": {
        "ela": {"image": {"auroc": 0.54, "ece": 0.2}, "localization": {"f1": 0.21}},
        "noise_variance": {"image": {"auroc": 0.6}, "localization": {"f1": 0.25}},
    },
    "intervals": {"image.auroc": [0.89, 0.96]},
    "run": {"seconds": 431.2, "seed": 7, "versions": {"torch": "2.13.0"}},
}
HISTORY = [
    {"step": 10, "loss": 3.0, "loss_text": 2.0, "loss_dice": 1.0, "learning_rate": 1e-3, "epoch": 0.1},
    {"step": 20, "loss": 2.0, "loss_text": 1.5, "loss_dice": 0.5, "learning_rate": 5e-4, "epoch": 0.2},
    {"step": 20, "eval_loss": 2.1, "eval_loss_dice": 0.6, "eval_auroc": 0.8, "eval_runtime": 3.0},
    {"step": 20, "train_runtime": 99.0, "train_loss": 2.5},
]


def sample(name="s-1", label_true=1, label_pred=1, size_hw=(40, 60), **changes):
    rng = np.random.default_rng(0)
    mask = np.zeros(size_hw, dtype=bool)
    mask[: size_hw[0] // 2] = label_true == 1
    values = {
        "id": name,
        "image": rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8),
        "true_mask": mask,
        "mask_scores": rng.random(size_hw).astype(np.float32),
        "label_true": label_true,
        "label_pred": label_pred,
        "score": 0.8 if label_pred else 0.2,
        "f1": 0.7 if label_true == 1 else None,
        "text": '{"result": "fake"}',
        "parse_ok": True,
        "operation": "splice" if label_true == 1 else "",
    }
    return ReportSample(**{**values, **changes})


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that every tag that opens is closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page_text():
    samples = [sample(), sample("s-2", 1, 0), sample("s-3", 0, 1), sample("s-4", 0, 0)]
    return render_report(title="快速开始 run", metrics=METRICS, samples=samples, history=HISTORY, run={"model": "tiny"})


def test_page_is_well_formed_and_refers_to_nothing_outside(page_text):
    page = Page(page_text)
    assert page.open == []
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert tag not in ("link", "iframe", "object")
    for outside in ("http:", "https:", "url("):
        assert outside not in page_text
    assert [attributes["charset"] for tag, attributes in page.tags if "charset" in attributes] == ["utf-8"]


def test_every_picture_has_an_alternative_text(page_text):
    pictures = [attributes for tag, attributes in Page(page_text).tags if tag == "img" and "src" in attributes]
    assert len(pictures) == 4 * 4 + 1  # four per card and the colour bar
    assert all(attributes.get("alt") for attributes in pictures)
    assert all(
        attributes.get("aria-label") for tag, attributes in Page(page_text).tags if attributes.get("role") == "img"
    )


def test_cards_carry_what_the_buttons_filter_by(page_text):
    cards = {attributes["data-index"]: attributes for tag, attributes in Page(page_text).tags if tag == "article"}
    assert [cards[str(i)]["data-outcome"] for i in range(4)] == ["tp", "fn", "fp", "tn"]
    assert [cards[str(i)]["data-op"] for i in range(4)] == ["op0", "op0", "", ""]
    assert [cards[str(i)]["data-f1"] for i in range(4)] == ["0.7", "0.7", "", ""]
    buttons = [attributes["data-filter"] for _, attributes in Page(page_text).tags if "data-filter" in attributes]
    assert buttons == ["all", "wrong", "fn", "fp", "op0"]


def test_facts_metrics_and_curves_are_there(page_text):
    for text in ("7 min 11 s", "torch <b>2.13.0</b>", "0.930", "0.890 – 0.960", "0.210", "0.250", "0.117"):
        assert text in page_text, text
    for caption in ("Total loss", "Text cross-entropy", "Mask Dice loss", "Learning rate", "Eval auroc", "ROC curve"):
        assert caption in page_text, caption
    assert "runtime" not in page_text
    without_pictures = re.sub(r"data:[^\"]+", "", page_text)
    assert not re.search(r"\bnan\b|\bNone\b", without_pictures)


def test_data_is_escaped_wherever_it_stands():
    evil = "\"><script>alert(1)</script>&'"
    page_text = render_report(
        title=evil,
        metrics={
            "image": {evil: 0.5},
            "baselines": {evil: {"image": {"auroc": 0.5}}},
            "run": {evil: evil, "versions": {evil: evil}, "list": [evil]},
        },
        samples=[sample(evil, text=evil, operation=evil)],
        history=[{"step": 1, evil: 1.0, f"eval_{evil}": 0.5}],
    )
    scripts = re.findall(r"<script", page_text)
    assert len(scripts) == 1
    assert Page(page_text).open == []
    assert "&lt;script&gt;" in page_text


def test_empty_report_says_so_and_shows_dashes():
    text = render_report(title="empty", metrics={}, samples=[])
    assert Page(text).open == []
    assert text.count("没有记录") == 3
    assert f'<td class="none">{DASH}</td>' in text


def test_samples_without_truth_scores_or_text():
    bare = sample(label_true=None, true_mask=None, mask_scores=None, f1=None, text="", parse_ok=None, operation="")
    page = Page(render_report(title="t", metrics={}, samples=[bare]))
    assert sum(tag == "article" and attributes["data-outcome"] == "unknown" for tag, attributes in page.tags) == 1
    assert sum(tag == "img" and "loading" in attributes for tag, attributes in page.tags) == 1  # only the image itself


def test_not_parsable_text_is_marked():
    assert "not parsable" in cards_html([sample(parse_ok=False)], 0.5)
    assert "not parsable" not in cards_html([sample(parse_ok=True)], 0.5)


@pytest.mark.parametrize("size_hw", [(1, 1), (700, 12), (9, 640)])
def test_any_aspect_ratio(size_hw):
    assert cards_html([sample(size_hw=size_hw)], 0.5).count("<img") == 4


def test_a_mask_of_another_size_names_the_record():
    with pytest.raises(ValueError, match="record 's-1': mask of shape"):
        cards_html([sample(mask_scores=np.zeros((3, 3)))], 0.5)


def test_sixty_noisy_samples_stay_below_the_limit():
    samples = [sample(f"s-{i}", size_hw=(256, 256)) for i in range(60)]  # noise is the worst case for JPEG
    page_text = render_report(title="size", metrics=METRICS, samples=samples, history=HISTORY)
    assert len(page_text.encode()) < 8_000_000
    assert len(cards_html(samples, 0.5)) < TOTAL_IMAGE_BYTES * 1.05


def test_table_has_both_baselines_beside_the_model_and_is_aligned():
    lines = format_table(METRICS).splitlines()
    assert lines[0].split() == ["模型", "model", "95%", "区间", "CI", "ELA", "噪声", "noise"]
    row = next(line for line in lines if "AUROC" in line)
    assert re.findall(r"\d\.\d+", row) == ["0.930", "0.890", "0.960", "0.540", "0.600"]
    assert "0.930*" in row
    ece = next(line for line in lines if "ECE" in line)
    assert ece.count("*") == 1
    assert "0.070*" in ece  # less is better
    assert not any("IoU" in line or "parse" in line for line in lines)  # nothing known: no row
    body = [line for line in lines if line.startswith("  ")]
    ends = {display_width(line[: line.index("*")]) for line in body if "*" in line}
    assert len(ends) == 1, "the model's column is aligned although names are Chinese"


def test_table_of_nothing_is_only_a_head():
    assert len(format_table({}).splitlines()) == 3
    assert (
        len(format_table({"image": None, "baselines": None, "intervals": {"image.auroc": [None, 1]}}).splitlines()) == 3
    )


def test_unknown_numbers_of_a_group_get_a_row():
    rows = metric_rows({"localization": {"permuted_f1": 0.6, "note": "text"}})
    assert len(rows) == len(ROWS) - len(ONLY_WHERE_PRESENT) + 1
    assert "permuted_f1" in format_table({"localization": {"permuted_f1": 0.6}})


def test_display_width():
    assert display_width("AUROC") == 5
    assert display_width("误报率") == 6
    assert display_width("（a）") == 5


def test_numbers_and_seconds():
    assert [format_number(value) for value in (0.12345, 3, None, math.nan, "x", True)] == ["0.123", "3"] + [DASH] * 4
    assert format_number(np.float32(0.5)) == "0.500"
    assert [format_seconds(value) for value in (48.24, 725, 11220)] == ["48.2 s", "12 min 05 s", "3 h 07 min"]


def test_training_charts_join_training_and_evaluation():
    figures = training_charts(HISTORY).split("</figure>")[:-1]
    assert len(figures) == 5  # loss, loss_dice, loss_text, eval_auroc, learning_rate
    assert {"train", "eval"} <= set(re.findall(r"[a-z]+", figures[0]))
    assert training_charts([]) == ""
    broken = training_charts([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}])
    assert not re.search("nan|inf", broken)


def test_resumed_runs_keep_the_later_value():
    chart = training_charts([{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 1.0}])
    assert "9 to 1" in chart


def test_roc_points_of_ties_by_hand():
    assert roc_points([1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1]) == [(0, 0), (0, 0.5), (0.5, 1), (1, 1)]
    assert roc_points([1, 1], [0.2, 0.3]) == []


def test_histogram_of_one_class_and_of_constant_scores():
    for labels in ([0, 0], [1, 1]):
        assert "<rect" in histogram(labels, [1.0, 1.0])


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 617) == pytest.approx([200, 400, 600])
    assert ticks(1e-6, 9e-6) == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6])


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(3000)]
    short = thin(points)
    assert len(short) == 300
    assert np.mean([y for _, y in short]) == pytest.approx(np.mean([y for _, y in points]))


def test_same_input_same_file():
    arguments = {"title": "t", "metrics": METRICS, "samples": [sample()], "history": HISTORY}
    assert render_report(**arguments) == render_report(**arguments)


def test_report_and_baselines_do_not_import_torch():
    code = (
        "import sys, finetune.inference.pages.report, finetune.inference.visualization, finetune.evaluation.baselines; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_was_evaluated_once_is_a_table_and_no_curve() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_auroc": 0.75, "eval_loss": 1.5}]
    (losses, table) = training_charts(history).split("</figure>")[:-1]
    assert losses.count("<svg") == 1
    assert "at step 2" in table
    assert "Eval auroc" in table
    assert ">0.750<" in table
    assert "<svg" not in table
    again = training_charts([*history, {"step": 4, "eval_auroc": 0.8, "eval_loss": 1.2}])
    assert again.count("<svg") == 2
    assert "<table" not in again
    rare = training_charts([*history, {"step": 4, "eval_f1": 0.5}])  # two evaluations, of other quantities
    assert rare.count("<svg") == 3


def test_operations_as_told_are_shown_where_a_model_tells_them() -> None:
    right = sample("a", told_operation="splice")
    kind = sample("b", operation="retouch", told_operation="retouch.grain")
    wrong = sample("c", operation="retouch", told_operation="splice")
    missed = sample("d", label_pred=0, told_operation="retouch.grain")
    page = render_report(title="t", metrics={}, samples=[right, kind, wrong, missed])
    assert page.count("Operation, as told") == 4
    assert page.count("<dd>retouch.grain</dd>") == 1  # not where the verdict is that nothing was done
    assert "Operation told right" in page
    assert "Operation told right" not in render_report(title="t", metrics={}, samples=[sample("a")])


def test_operations_of_all_images_replace_those_of_the_shown_ones() -> None:
    rows = {
        "splice": {"n": 52, "auroc": 0.91, "recall": 0.8, "f1": 0.72, "recognized": 0.846},
        "<b>": {"n": 3, "auroc": None, "f1": None},
    }
    wide = {"intervals_over_groups": {"image.auroc": [0.792, 0.923], "localization.f1": [None, None]}}
    page = render_report(title="t", metrics={"operations": rows, **wide}, samples=[sample("a")])
    assert "By operation (all images)" in page
    assert "samples below" not in page
    assert "<td>52</td><td>0.910</td><td>0.800</td><td>0.720</td><td>0.846</td>" in page
    assert "<b></th>" not in page
    assert "whole groups (photographs, scenes): AUROC 0.792 – 0.923." in page
    plain = render_report(title="t", metrics={}, samples=[sample("a")])
    assert "samples below" in plain
    assert "whole groups" not in plain


def test_scores_before_calibration_are_a_group_only_where_scores_were_calibrated() -> None:
    own = {"auroc": 0.91, "average_precision": 0.92, "ece": 0.15, "accuracy": 0.79, "balanced_accuracy": 0.78}
    for uncalibrated, count in (({}, 0), (own, 1)):
        metrics = {"image": {"auroc": 0.91, "ece": 0.04}, "image_uncalibrated": uncalibrated}
        page = render_report(title="t", metrics=metrics, samples=[])
        assert page.count("scores before calibration") == count
        assert page.count("<td>0.150</td>") + page.count('<td class="best">0.150</td>') == count
        assert format_table(metrics).count("scores before calibration") == count


def test_images_without_a_verdict_have_a_row_only_where_there_are_some() -> None:
    for metrics, count in (({"image": {"auroc": 0.5}}, 0), ({"image": {"auroc": 0.5, "n_without_verdict": 7}}, 1)):
        page = render_report(title="t", metrics=metrics, samples=[])
        assert page.count("Images without a verdict") == count
