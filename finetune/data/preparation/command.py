"""`forensics prepare`: a configuration to a stored set and its audit; the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.config import load_config
from finetune.data.preparation.config import PrepareConfig
from finetune.data.preparation.prepare import Prepared, prepare


def prepare_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics prepare`; 1 when the audit of the finished set found an error, else 0.

    Raises:
        ForensicsError: see `prepare`.
    """
    config = load_config(arguments.config, arguments.overrides, PrepareConfig)
    for name in ("on_error", "workers"):
        if (value := getattr(arguments, name)) is not None:
            setattr(config, name, value)
    done = prepare(config, overwrite=arguments.overwrite)
    print("\n".join(done.lines()))
    return _audit(config, done) if config.audit else 0


def _audit(config: PrepareConfig, done: Prepared) -> int:
    """Audit every split that holds something; the pages go to `<out_dir>/audit`."""
    from finetune.data.audit.run import AuditSettings, find_sources, run_audit
    from finetune.data.audit.writing import summary_lines, write_audit

    held = {split for split, count in done.written.items() if count}
    sources = [source for source in find_sources([str(done.out_dir)]) if source.split in held]
    settings = AuditSettings(max_distance=config.splits.max_hash_distance, workers=config.workers)
    audit = run_audit(sources, settings)
    folder = Path(done.out_dir) / "audit"
    write_audit(audit, sources, folder)
    print("audit:")
    print("\n".join(f"  {line}" for line in summary_lines(audit)))
    print(f"wrote {folder / 'audit.json'} and {folder / 'audit.html'}")
    return 1 if audit.num_errors else 0
