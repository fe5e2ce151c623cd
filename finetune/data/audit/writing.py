"""Writes an audit: a summary for the terminal, audit.json for programs and audit.html for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.data.audit.findings import Audit, Finding
from finetune.data.audit.page import audit_page
from finetune.data.audit.run import Source, records_by_number
from finetune.data.audit.texts import advice, feature_name, title

_SHOWN_LEAKS = 3


def write_audit(audit: Audit, sources: Sequence[Source], out_dir: str | Path) -> None:
    """Write `audit.json` and `audit.html` into a folder that is made where it is missing."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(audit), ensure_ascii=False, indent=1)
    (folder / "audit.json").write_text(text + "\n", encoding="utf-8")
    wanted = {example.number for finding in audit.findings for example in finding.examples if example.number >= 0}
    page = audit_page(audit, records_by_number(sources, wanted))
    (folder / "audit.html").write_text(page, encoding="utf-8")


def to_json(audit: Audit) -> dict[str, object]:
    """Plain values with the wording of every finding in both languages."""
    return {
        "errors": audit.num_errors,
        "warnings": audit.num_warnings,
        "sources": audit.sources,
        "settings": audit.settings,
        "counts": audit.counts,
        "findings": [
            {
                **asdict(finding),
                "title": title(finding),
                "title_zh": title(finding, "zh"),
                "advice": advice(finding),
                "advice_zh": advice(finding, "zh"),
            }
            for finding in audit.findings
        ],
        "leaks": [asdict(leak) for leak in audit.leaks],
        "seconds": audit.seconds,
    }


def summary_lines(audit: Audit) -> list[str]:
    """What the terminal shows: a line per split, the strongest leaks, a line per finding with its first examples."""
    lines = [
        f"{name}: {counts['records']} records in {counts['groups']} groups, {_num_images(counts)} images: "
        f"{counts['real']} real, {counts['tampered']} tampered, {counts['unlabelled']} without label"
        for name, counts in audit.counts["splits"].items()
    ]
    if tokens := audit.counts["tokens"]:
        limit = f", limit {tokens['limit']}" if "limit" in tokens else ""
        lines.append(f"tokens: median {tokens['median']:.0f}, 95 % {tokens['p95']:.0f}, longest {tokens['max']}{limit}")
    judged = sorted((leak for leak in audit.leaks if leak.auroc is not None), key=lambda leak: -(leak.auroc or 0))
    if judged:
        parts = [f"{feature_name(leak)} {leak.auroc:.2f}" for leak in judged[:_SHOWN_LEAKS]]
        lines.append(f"strongest clues to the label (AUROC on unseen groups): {', '.join(parts)}")
    lines += [finding_line(finding) for finding in audit.findings]
    lines.append(f"{audit.num_errors} errors, {audit.num_warnings} warnings")
    return lines


def _num_images(counts: dict[str, int]) -> int:
    """Of a split, readable or not."""
    return counts["real"] + counts["tampered"] + counts["unlabelled"]


def finding_line(finding: Finding) -> str:
    """`error: images that cannot be opened: 3 (a, b, c); fix: ...`."""
    ids = list(dict.fromkeys(example.record for example in finding.examples if example.record))
    more = " ..." if len(ids) > 3 or finding.count > len(finding.examples) else ""
    named = f" ({', '.join(ids[:3])}{more})" if ids else ""
    if note := finding.details.get("note"):  # what separates the classes says more than two names of each
        named = f"; {note}"
    elif not ids and finding.examples and finding.examples[0].note:  # a row without an id: what its reader said
        named = f"; first: {finding.examples[0].note}"
    line = f"{finding.severity}: {title(finding)}{named}; fix: {advice(finding)}"
    return line if finding.severity != "info" else line.replace("; fix: ", "; ")
