"""`forensics merge`: an adapter becomes a standalone folder, verified by loading that folder again.

Two kinds: a whole model of ours (heads inside), and with `plain` a folder that any Qwen2.5-VL tool loads (released
weight names, the base's own config.json, heads beside it). All arithmetic is float32, but for a second comparison in
float64 where the first finds a difference; weights are rounded to the stored type once, at the end. Verification is
`finetune.models.verification`'s part.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig
from transformers.utils import cached_file

from finetune.config import HeadsConfig, ModelConfig
from finetune.config.model_folder import ADAPTER_CONFIG, CALIBRATION, FRAME, MODEL_CONFIG
from finetune.errors import ConfigError, ModelLoadError
from finetune.models.loading import (
    SETTINGS,
    Bundle,
    base_model_path,
    is_plain,
    load_bundle,
    save_bundle,
    save_processor,
)
from finetune.models.plain import CONFIG_FIELDS, SECTION, heads_settings, is_head, read_config, write_heads
from finetune.models.qwen_forensics_model import QwenForensicsConfig
from finetune.models.verification import TOLERANCE, Outputs, compare, outputs_of, plain_outputs, worst
from finetune.models.vision_parts import parts_section

REPORT = "merge_report.json"
_READ = ModelConfig(dtype="float32", attn_implementation="sdpa", language="load")


def merge_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics merge`; exit status 0."""
    report = merge(
        arguments.model,
        arguments.adapter,
        arguments.out,
        plain=arguments.plain,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        max_shard_size=arguments.max_shard_size,
    )
    print(describe(report))
    print(f"wrote {arguments.out}: {', '.join(report['files'])}")
    return 0


def merge(
    model: str,
    adapter: str | None,
    out_dir: str | Path,
    *,
    plain: bool = False,
    dtype: str = "auto",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write a standalone folder and compare it with what it was made from; nothing is left of a failed attempt.

    Args:
        model: base model, whole model of ours (then with `plain` or another `dtype`), or a folder that names its base:
            an adapter, or vision heads. The base is read unquantised, also for an adapter trained on a 4-bit one.
        plain: write a plain Qwen2.5-VL with the heads beside it instead of a model of ours.
        dtype: of the stored weights, `auto` as the base's; heads stay float32.
        overwrite: replace an existing model folder once the new one is complete and verified.

    Returns:
        The content of merge_report.json: what was merged, largest differences, files.

    Raises:
        ModelLoadError: something cannot be loaded, or the written folder computes something else.
        ConfigError: an output folder that exists, or nothing to merge.
    """
    base = model
    has_parts = parts_section(model) is not None
    if adapter is None and (Path(model) / ADAPTER_CONFIG).is_file():
        base, adapter = base_model_path(model), model
    out_dir = Path(out_dir)
    _check_request(base, adapter, out_dir, needs_merging=has_parts, plain=plain, dtype=dtype, overwrite=overwrite)
    stored = _stored_dtype(base, dtype)
    bundle = load_bundle(replace(_READ, path=base, adapter=adapter))
    bundle.model.eval()
    if plain:
        _check_plain(bundle)
    report: dict[str, Any] = {
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "kind": "plain" if plain else "full",
        "dtype": str(stored).removeprefix("torch."),
        "vocabulary_rows": bundle.base.get_input_embeddings().weight.shape[0],
        "tolerance": TOLERANCE,
    }
    image_processor = bundle.processor.image_processor
    frame = {name: getattr(image_processor, name) for name in FRAME if hasattr(image_processor, name)}
    if plain and frame:
        report["frame"] = frame
        print(f"warning: the model sees images by {frame}; other tools than this one do not, and their answers differ")
    before = outputs_of(bundle)
    if bundle.model is not bundle.base:
        bundle = _merged(bundle)
        report["merge"] = compare(before, merged := outputs_of(bundle))
        if worst(report["merge"]) > TOLERANCE:
            report["merge_float64"] = _merge_in_float64(base, adapter)
    else:
        merged = before
    bundle = replace(bundle, tower=None)  # the folder is to stand alone
    with _new_folder(out_dir) as folder:
        _round_weights(bundle, stored)
        if plain:
            _write_plain(bundle, folder, base, stored, max_shard_size)
        else:
            save_bundle(bundle, folder, max_shard_size=max_shard_size)
        calibration = Path(adapter or model) / CALIBRATION  # of the same heads
        if calibration.is_file():
            shutil.copyfile(calibration, folder / CALIBRATION)
        _round_weights(bundle, torch.float32)
        rounded = outputs_of(bundle)
        report["rounding"] = compare(merged, rounded)
        del bundle  # before the folder is read: one model in memory at a time
        _verify(folder, rounded, report, plain=plain)
        report["files"] = [*sorted(path.name for path in folder.iterdir()), REPORT]
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    return report


def describe(report: dict[str, Any]) -> str:
    """The measured differences as lines for the terminal."""
    meaning = {
        "merge": "adapter on its base against merged weights, float32",
        "merge_float64": "the same in float64, where float32 differed by too much; this one is checked",
        "reload": "merged weights in memory against the folder read again",
        "plain": "the same, read by Qwen2_5_VLForConditionalGeneration",
        "rounding": f"float32 against stored {report['dtype']}; a property of the type, not checked",
    }
    lines = [f"{'largest difference':20}{'logits':>10}{'scores':>10}{'masks':>10}"]
    for name, text in meaning.items():
        if name in report:
            values = [report[name].get(key) for key in ("logits", "scores", "masks")]
            cells = "".join(f"{'-' if value is None else f'{value:.1e}':>10}" for value in values)
            lines.append(f"{name:20}{cells}  {text}")
    return "\n".join(lines)


# ---- what is asked for ----


def _check_request(
    base: str, adapter: str | None, out_dir: Path, *, needs_merging: bool, plain: bool, dtype: str, overwrite: bool
) -> None:
    for source in filter(None, (base, adapter)):
        if Path(source).is_dir() and out_dir.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise ConfigError(f"--out {out_dir} is or contains {source}, which is read; give another folder")
    own = read_config(base)
    if own is not None and not own.has_language and not needs_merging:
        raise ConfigError(f"{base} was saved without its language model; merged models are checked by what they write")
    if adapter is None and not needs_merging and not plain and dtype == "auto":
        raise ConfigError(
            f"nothing to merge: {base} is a whole model; give --adapter, or --plain or --dtype to write it in another "
            "form"
        )
    if out_dir.is_file():
        raise ConfigError(f"--out {out_dir} is a file; give a folder that does not exist yet")
    if not out_dir.is_dir() or not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"--out {out_dir} exists and is not empty; give another folder, or --overwrite to replace it")
    if not (out_dir / MODEL_CONFIG).is_file():
        raise ConfigError(f"--overwrite replaces model folders only, and {out_dir} has no config.json; empty it first")


def _stored_dtype(base: str, dtype: str) -> torch.dtype:
    is_plain(base)  # names a missing folder before transformers looks for it on the hub
    config = QwenForensicsConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError(
            f"{base} is stored quantised, so merged weights would be rounded twice; give the full-precision model it "
            "was made from as --model"
        )
    if dtype != "auto":
        return getattr(torch, dtype)
    found = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def _check_plain(bundle: Bundle) -> None:
    if hasattr(bundle.base, "stream_to_language"):
        raise ConfigError(
            "--plain: this model's language part reads the noise-residual stream "
            "(heads.noise_residual.to_language), which a plain Qwen2.5-VL cannot compute, so its text would change; "
            "merge without --plain, or train with to_language: false"
        )
    if bundle.base.config.region_features:
        raise ConfigError(
            "--plain: this model's language part reads what the tower saw in each region (model.region_features), "
            "which a plain Qwen2.5-VL does not compute, so its text would change; merge without --plain"
        )


# ---- weights ----


def _merged(bundle: Bundle) -> Bundle:
    """LoRA added to the base's weights, token rows written into the matrices, trained modules in their places."""
    is_tied = bool(bundle.base.config.tie_word_embeddings)
    model = bundle.model.merge_and_unload(safe_merge=True)
    if is_tied:
        model.tie_weights()
    return Bundle(model.eval(), bundle.processor, bundle.tokens, bundle.settings)


def _merge_in_float64(base: str, adapter: str | None) -> dict[str, float | None]:
    """The comparison without float32's rounding, which large weights may amplify beyond any tolerance."""
    bundle = load_bundle(replace(_READ, path=base, adapter=adapter))
    bundle.model.eval().double()
    before = outputs_of(bundle)
    return compare(before, outputs_of(_merged(bundle)))


def _round_weights(bundle: Bundle, dtype: torch.dtype) -> None:
    """Everything but the heads, which stay float32, in place; tied matrices stay tied."""
    for name, parameter in bundle.base.named_parameters():
        if not is_head(name):
            parameter.data = parameter.data.to(dtype)


# ---- the folder ----


@contextmanager
def _new_folder(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` that takes its place once the block is done, and vanishes if it fails."""
    fresh = out_dir.with_name(f".{out_dir.name}.merging")
    old = out_dir.with_name(f".{out_dir.name}.old")
    for left_over in (fresh, old):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if out_dir.exists():
        out_dir.rename(old)
    fresh.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _write_plain(bundle: Bundle, folder: Path, base: str, dtype: torch.dtype, max_shard_size: str) -> None:
    model = bundle.base
    state = {name: value for name, value in model.state_dict().items() if not is_head(name)}
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    config = _plain_config(bundle, base, dtype)
    (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_processor(bundle.processor, folder)
    _write_preprocessor(bundle.processor, folder)
    settings = dict(bundle.settings)
    if model.has_heads:
        write_heads(model, folder)
        settings[SECTION] = heads_settings(model.config)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _plain_config(bundle: Bundle, base: str, dtype: torch.dtype) -> dict[str, Any]:
    """The base's own config.json where it is a plain one (serving tools know its spelling), else one written anew."""
    file = cached_file(base, MODEL_CONFIG)
    tree: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    if tree.get("model_type") != Qwen2_5_VLConfig.model_type:
        fields = bundle.base.config.to_dict()
        for name in (*CONFIG_FIELDS, "region_features", "model_type"):
            fields.pop(name, None)
        tree = json.loads(Qwen2_5_VLConfig.from_dict(fields).to_json_string(use_diff=True))
    tree["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    tree["model_type"] = Qwen2_5_VLConfig.model_type
    tree["torch_dtype" if "torch_dtype" in tree else "dtype"] = str(dtype).removeprefix("torch.")
    text = tree if "vocab_size" in tree else tree["text_config"]
    text["vocab_size"] = bundle.base.get_input_embeddings().weight.shape[0]
    return tree


def _write_preprocessor(processor: Any, folder: Path) -> None:
    """preprocessor_config.json as released: older tools look for it, transformers 5 writes processor_config.json."""
    image = processor.image_processor
    tree = {
        "min_pixels": image.size["shortest_edge"],
        "max_pixels": image.size["longest_edge"],
        "patch_size": image.patch_size,
        "temporal_patch_size": image.temporal_patch_size,
        "merge_size": image.merge_size,
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(tree, indent=2), encoding="utf-8")


def _verify(folder: Path, expected: Outputs, report: dict[str, Any], *, plain: bool) -> None:
    """Read the folder as its users will and compare; raises where a difference exceeds the tolerance."""
    # A plain folder without heads beside it would be given new ones, whose tokens would stand in the text.
    off = HeadsConfig(enabled=False) if plain and expected.scores is None else None
    reloaded = load_bundle(replace(_READ, path=str(folder)), heads=off)
    reloaded.model.eval()
    report["reload"] = compare(expected, outputs_of(reloaded))
    if plain:
        report["plain"] = compare(expected, plain_outputs(folder, reloaded))
    merge_line = "merge_float64" if "merge_float64" in report else "merge"
    for name in (merge_line, "reload", "plain"):
        if name in report and (found := worst(report[name])) > TOLERANCE:
            raise ModelLoadError(
                f"the merged model computes something else than its source: '{name}' differs by {found:.2g}, allowed "
                f"is {TOLERANCE:g} ({json.dumps(report[name])}); nothing was written"
            )
