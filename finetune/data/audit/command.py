"""`forensics audit`: arguments to sources and settings, the summary on stdout, the exit status."""

from __future__ import annotations

import argparse

from finetune.data.audit.run import AuditSettings, CountTokens, find_sources, run_audit
from finetune.data.audit.writing import summary_lines, write_audit
from finetune.data.readers.options import options_from
from finetune.errors import ConfigError


def audit_command(
    arguments: argparse.Namespace, count_tokens: CountTokens | None = None, max_length: int | None = None
) -> int:
    """Handler of `forensics audit`; 1 when an error was found, else 0.

    Args:
        count_tokens, max_length: length of a record in tokens and its limit, where a model was named.

    Raises:
        ConfigError: a `--split` without a name, or nothing to audit.
    """
    named = [_named(text) for text in arguments.split]
    sources = find_sources(arguments.data, named, arguments.format, arguments.data_root, options_from(arguments.option))
    settings = AuditSettings(
        group_by=arguments.group_by,
        leak_threshold=arguments.leak_threshold,
        max_distance=arguments.hash_distance,
        max_length=max_length,
        num_cls=arguments.num_cls,
        num_mask=arguments.num_mask,
        workers=arguments.workers,
    )
    audit = run_audit(sources, settings, count_tokens)
    print("\n".join(summary_lines(audit)))
    if arguments.out:
        write_audit(audit, sources, arguments.out)
        print(f"wrote {arguments.out}/audit.json and {arguments.out}/audit.html")
    return 1 if audit.num_errors else 0


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConfigError(f"--split {text!r}; expected NAME=FILE, e.g. --split test=test.jsonl")
    return name, path
