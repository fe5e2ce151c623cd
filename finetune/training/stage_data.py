"""The data files that a run reads over all of its stages, each one once: for checks before the first stage begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune.config import RunConfig, SourceConfig, StageRun, stage_runs, to_dict
from finetune.data.sources import read_sources
from finetune.data.template import load_template
from finetune.data.validation import validate_for_training
from finetune.special_tokens import SpecialTokens


class Read(NamedTuple):
    """A file that is read. what: `train` or `eval`. config: of the first stage that reads it so."""

    what: str
    source: SourceConfig
    config: RunConfig


def configs_of(config: RunConfig) -> list[RunConfig]:
    """The configuration of every stage, or the one of a run without stages."""
    return [run.config for run in stage_runs(config)] or [config]


def files_read(configs: Sequence[RunConfig]) -> list[Read]:
    """Every file with what it is read for; once where several configurations read it in the same way."""
    found: dict[str, Read] = {}
    for config in configs:
        for what in ("train", "eval"):
            for source in getattr(config.data, what):
                found.setdefault(_way(what, source, config), Read(what, source, config))
    return list(found.values())


def unweighted(source: SourceConfig) -> SourceConfig:
    """The same records, each once."""
    return replace(source, weight=1.0)


def _way(what: str, source: SourceConfig, config: RunConfig) -> str:
    """Equal where two stages would find the same wrong with a file."""
    data = replace(config.data, train=[], eval=[])
    heads = (config.reads_pictures_only, config.heads.enabled, config.heads.source)
    return repr((what, to_dict(unweighted(source)), to_dict(data), to_dict(config.tokens), heads))


def check_later_data(waiting: Sequence[StageRun]) -> None:
    """Read what later stages read and the first of them does not, and its files' headers: now, not when they begin.

    Raises:
        DataFormatError: as `validate_for_training`.
    """
    now = {_way(*read) for read in files_read([run.config for run in waiting[:1]])}
    for what, source, config in files_read([run.config for run in waiting[1:]]):
        if _way(what, source, config) not in now:
            words = load_template(config.data.template).result_words
            tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
            has_text = not config.reads_pictures_only
            records = read_sources([unweighted(source)], what)
            validate_for_training(records, tokens, check_pixels=False, has_text=has_text, words=words)
