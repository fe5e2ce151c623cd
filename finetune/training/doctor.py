"""`forensics doctor`: the environment, a data file or a configuration, every problem at once and one line each."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from finetune.config import RunConfig, SourceConfig, load_config, stage_runs
from finetune.data.dataset import ForensicDataset, leaks
from finetune.data.image_frame import set_frame
from finetune.data.pictures import PictureDataset
from finetune.data.readers.options import options_from
from finetune.data.regions.limit import fitted_records
from finetune.data.sources import shared_warning
from finetune.data.template import Layout, Template, load_template
from finetune.data.validation import Problem, check_file
from finetune.errors import ConfigError, ForensicsError, ModelLoadError
from finetune.models.configuration import check_heads
from finetune.models.loading import check_continuation, load_processor
from finetune.models.plain import read_config
from finetune.progress import progress_bar
from finetune.schema import Record
from finetune.special_tokens import SpecialTokens
from finetune.training.checks import run_problems
from finetune.training.planned_model import planned_config
from finetune.training.reproducibility import versions
from finetune.training.stage_data import configs_of, files_read, unweighted


def doctor_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics doctor`; exit status 1 when an error was found, else 0."""
    if arguments.hardware:
        return _print_memory(load_config(arguments.config, arguments.overrides), arguments.hardware)
    if not arguments.data and not arguments.config:
        print_environment()
        return 0
    problems: list[Problem] = []
    if arguments.config:
        problems += check_config(load_config(arguments.config, arguments.overrides))
    if arguments.data:
        tokens = SpecialTokens(arguments.num_cls, arguments.num_mask)
        options = options_from(arguments.option)
        source = SourceConfig(arguments.data, arguments.format, arguments.data_root, options=options)
        records, found = check_data_file(source, tokens)
        summary(arguments.data, records)
        problems += found
    return report(problems)


def _print_memory(config: RunConfig, hardware: str) -> int:
    """The memory estimate alone: neither data nor weights need to be on this machine."""
    from finetune.training.memory import memory_report

    lines, is_fitting = memory_report(config, hardware)
    print("\n".join(lines))
    return 0 if is_fitting else 1


def print_environment() -> None:
    """Versions, devices and optional packages."""
    for name, version in versions().items():
        print(f"{name:14} {version}")
    print(f"{'platform':14} {platform.platform(terse=True)}")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(f"{'gpu ' + str(index):14} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        print(f"{'gpu':14} none found: training runs on {torch.get_num_threads()} CPU threads")
    for package, purpose in (
        ("bitsandbytes", "QLoRA (model.quantization: nf4)"),
        ("flash_attn", "faster attention on CUDA"),
    ):
        state = "installed" if importlib.util.find_spec(package) else "not installed (optional)"
        print(f"{package:14} {state}: {purpose}")
    for tool in ("g++", "ninja"):
        print(f"{tool:14} {'found' if shutil.which(tool) else 'not found'}: DeepSpeed compiles its operators with it")


def check_config(config: RunConfig) -> list[Problem]:
    """Everything about a configuration that can be known before training: settings, model folder, data, lengths."""
    problems = [_error(problem) for problem in run_problems(config)]
    tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
    problems += _impossible_heads(config)
    source = config.model.adapter or config.model.path
    try:
        check_continuation(source, read_config(source), tokens, config.heads)
    except ModelLoadError as error:
        problems.append(_error(str(error)))
    configs = configs_of(config)
    problems += [_error("data.train is empty") for own in configs if not own.data.train][:1]
    processor_of = cache(load_processor)
    try:
        processor_of(config.model.path, config.data.min_pixels, config.data.max_pixels)
    except ForensicsError as error:
        problems.append(_error(str(error)))
    records_of: dict[str, list[Record]] = {}
    for what, file, own in files_read(configs):
        try:
            processor = processor_of(own.model.path, own.data.min_pixels, own.data.max_pixels)
        except ForensicsError:
            processor = None
        records, found = _check_source(what, file, own, processor)
        records_of[repr(unweighted(file))] = records
        problems += found
    for own in configs:
        train, held = (
            [record for source in part for record in records_of[repr(unweighted(source))]]
            for part in (own.data.train, own.data.eval)
        )
        if warning := shared_warning(train, held):
            problems.append(Problem("warning", "", warning))
    return list(dict.fromkeys(problems))


def _check_source(
    what: str, source: SourceConfig, config: RunConfig, processor: Any
) -> tuple[list[Record], list[Problem]]:
    """The records of one file of a run, and what is wrong with them for it; lengths only with a processor."""
    tokens = SpecialTokens(config.tokens.num_cls, config.tokens.num_mask)
    on_tokens = config.heads.enabled and config.heads.source != "vision"
    try:
        template = load_template(config.data.template)
    except ConfigError:
        template = None  # among run_problems already
    try:
        has_text = not config.reads_pictures_only
        layout = config.data.layout if on_tokens else None
        records, problems = check_data_file(source, tokens, has_text, layout, template)
    except ForensicsError as error:
        return [], [_error(str(error))]
    summary(source.path, records)
    if processor is None or any(problem.severity == "error" for problem in problems):
        return records, problems
    set_frame(processor.image_processor, config.data.image_short_side, config.data.image_padding)
    kind = PictureDataset if config.reads_pictures_only else ForensicDataset
    try:
        fitted = fitted_records(records, what, config.data.max_regions)
        errors: Sequence[ForensicsError] = kind(fitted, processor, tokens, config.data).check_lengths()
    except ConfigError:
        errors = []  # among run_problems already
    except ForensicsError as error:
        errors = [error]
    return records, problems + [_error(str(error)) for error in errors]


def _impossible_heads(config: RunConfig) -> list[Problem]:
    """Heads that the model cannot have, of every stage; none where the model's shape is not known here."""
    found = []
    stages = [(f"stage '{run.name}': ", run.config, run.source) for run in stage_runs(config)]
    for stage, run, source in stages or [("", config, None)]:
        path = source if isinstance(source, str) and source else run.model.path
        try:
            planned = planned_config(replace(run, model=replace(run.model, path=path)))
            if planned is not None:
                check_heads(planned)
        except ConfigError as error:
            found.append(_error(f"{stage}{error}"))
    return found


def check_data_file(
    source: SourceConfig,
    tokens: SpecialTokens,
    has_text: bool = True,
    layout: Layout | None = "tokens_first",
    template: Template | None = None,
) -> tuple[list[Record], list[Problem]]:
    """The records of a file that can be read, and every problem of the file, its images, masks and tokens' places.

    Args:
        has_text: False for a run on pictures alone, which looks at no conversation.
        layout: where tokens are put that a conversation lacks; None where no head stands on tokens, so that no answer
            can leak into one.
        template: whose words for real and fake answers may use; by default `zh`.
    """
    template = template or load_template("zh")
    records, problems = check_file(
        source.path,
        tokens,
        format=source.format,
        root=source.root,
        options=source.options,
        has_text=has_text,
        words=template.result_words,
        progress=lambda items: progress_bar(items, total=len(items), unit="record"),
    )
    leaking = [
        record.id
        for record in records
        if layout is not None and (leaks(record, template, tokens, layout) if record.turns else layout == "text_first")
    ]
    if leaking:
        more = f" and {len(leaking) - 1} more" if len(leaking) > 1 else ""
        message = f"record '{leaking[0]}'{more}: a forensic token stands after text that gives its target away"
        problems.append(Problem("warning", leaking[0], message))
    return records, problems


def summary(path: str, records: list[Record]) -> None:
    """One line about a data file."""
    labels = [target.label for record in records for target in record.targets]
    with_mask = sum(target.has_mask for record in records for target in record.targets)
    print(
        f"{path}: {len(records)} records, {len(labels)} images: {labels.count(0)} real, {labels.count(1)} tampered, "
        f"{labels.count(None)} unlabelled, {with_mask} with a pixel target"
    )


def report(problems: list[Problem]) -> int:
    """Print every problem; 1 if one is an error."""
    for problem in problems:
        print(f"{problem.severity}: {problem.message}", file=sys.stderr)
    errors = sum(problem.severity == "error" for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} warnings")
    return 1 if errors else 0


def _error(message: str, record: str = "") -> Problem:
    return Problem("error", record, message)
