"""Settings of evaluating and inspecting with the vision pipeline: `config_eval.json` and `config_inference.json`.

The first fields of each class are the keys of the users' own files; those below them may be left out. Nothing is
opened here but the settings file; paths are taken from the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.config.conversion import build, to_dict
from finetune.config.loading import apply_override, read_tree
from finetune.config.sections import TestTimeAugmentation
from finetune.errors import ConfigError, shorten


@dataclass
class VisualLoraSettings:
    """The LoRA of the vision tower that stage C writes."""

    path: str | None = None  # PEFT folder such as best_val_auc/vision_lora; null: the one beside the heads, if any
    layers: list[int] | None = None  # blocks it must be on; null: whatever it is on


@dataclass
class VisionModelSettings:
    """The model, and how a score becomes a verdict."""

    base_model_path: str | None = None  # plain Qwen2.5-VL; null: the one that head_checkpoint was trained on
    visual_lora: VisualLoraSettings = field(default_factory=VisualLoraSettings)
    head_checkpoint: str = ""  # folder of a stage, or the heads.safetensors in it
    classification_threshold: float = 0.5  # an image with at least this score is called tampered
    heatmap_threshold: float = 0.5  # the same of a pixel
    batch_size: int = 8
    num_workers: int = 0  # threads that read images ahead
    calibration: str = "auto"  # auto: calibration.json beside the heads, off: the heads' own scores, or a file
    tta: TestTimeAugmentation = "none"  # heads read 1, 2 (hflip), 4 (flips) or 8 (dihedral) copies, averaged
    device: str = "auto"
    max_pixels: int | None = None  # bound of the processed image; null: as trained


@dataclass
class VisionEvalConfig(VisionModelSettings):
    """Everything `forensics vision evaluate` reads."""

    ann_eval: str = ""  # the annotation list, or any other format of data/README.md
    data_root: str | None = None  # paths of ann_eval start here; null: its own folder
    metrics_csv: str | None = None  # null: metrics.csv in inference_output
    inference_output: str = ""  # folder; with a suffix (.csv, .jsonl) the file of predictions, the rest lies beside it
    worst_cases: int = 24  # pictures of the worst cases
    report_samples: int = 48  # cards in report.html, the worst cases first
    max_samples: int | None = None  # evaluate this many records, evenly spread


@dataclass
class GenerationSettings:
    """How the explanation is written."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 always takes the likeliest token
    top_p: float = 1.0


@dataclass
class OutputSettings:
    """Where verdicts and evidence go."""

    csv: str = ""
    evidence_dir: str = ""


@dataclass
class VisionInferenceConfig(VisionModelSettings):
    """Everything `forensics vision infer` reads."""

    system_prompt: str | None = None  # of the explanation; null: one in `language`
    chat_system_prompt: str | None = None  # of the dialogue with --chat; null: one in `language`
    user_prompt: str | list[str] | None = (
        None  # the question, with {placeholders} of the evidence; several are drawn from
    )
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    images: str | list[str] = field(default_factory=list)  # files and folders; those on the command line replace them
    prompt_templates: list[str] = field(default_factory=list)  # further questions to draw from
    seed: int = 0  # of drawing a question, and of sampling with temperature
    language: Literal["zh", "en"] = "zh"  # of the evidence in words and of the built-in prompts
    explain: bool = True  # false: verdict and heat map only; the language model is not loaded
    overlay_as_second_image: bool = False  # also show the language model the heat map's overlay
    use_lora_for_text: bool = False  # leave the vision LoRA on while the language model looks at the image
    explanation_batch_size: int | None = None  # null: batch_size, or 1 with a temperature, so that a resume repeats it
    max_regions: int = 5  # regions named in the evidence
    overlay_side: int = 1600  # longer side of an overlay at most, in pixels
    min_region_area: float = 0.0005  # smaller regions, as a share of the image, are not named (the largest always is)

    @property
    def given_images(self) -> list[str]:
        """`images` as a list."""
        return [self.images] if isinstance(self.images, str) else self.images


C = TypeVar("C", bound=VisionModelSettings)


def load_vision_config(path: str | Path, overrides: Sequence[str], schema: type[C]) -> C:
    """Read a JSON (or YAML) file and apply `key.sub=value` overrides.

    `{"visual_lora": {"path": ...}}` and `{"visual_lora.path": ...}` mean the same. Where an override names another
    `inference_output`, a `metrics_csv` that lies in the file's own goes with it; so does a `visual_lora` that lies
    in the file's `head_checkpoint` where an override names another.

    Raises:
        ConfigError: the file is missing or no JSON, a key is unknown (with the nearest known one), a value is of
            another type or out of its range, a needed key is missing.
    """
    tree = _nested(_read(Path(path)), str(path))
    written = {key: tree.get(key) for key in ("inference_output", "metrics_csv", "head_checkpoint")}
    section = tree.get("visual_lora")
    own_lora = section.get("path") if isinstance(section, dict) else None
    for override in ("", *overrides):
        if override:
            apply_override(tree, override, schema)
        if tree.get("visual_lora", 0) is None:  # no section: the LoRA that lies beside the heads
            del tree["visual_lora"]
    given = {override.partition("=")[0].strip() for override in overrides}
    is_moved = "inference_output" in given and "metrics_csv" not in given
    if is_moved and _lies_in(written["metrics_csv"], written["inference_output"], (".csv", ".jsonl")):
        del tree["metrics_csv"]  # it goes with the folder it lay in, instead of over the other run's
    is_other = "head_checkpoint" in given and not any(key.split(".")[0] == "visual_lora" for key in given)
    if is_other and _lies_in(own_lora, written["head_checkpoint"], (".safetensors",)):
        del tree["visual_lora"]  # other heads have their own LoRA beside them, or none
    config = build(schema, tree, where=str(path))
    _check(config, str(path))
    return config


def _lies_in(path: Any, place: Any, suffixes: Sequence[str]) -> bool:
    """Whether a configured path lies in a configured folder, which may be named by a file in it with such a suffix."""
    if not isinstance(path, str) or not isinstance(place, str):
        return False
    folder = Path(place)
    return (folder.parent if folder.suffix.lower() in suffixes else folder) in (Path(path), Path(path).parent)


def identifying_settings(config: VisionModelSettings) -> dict[str, Any]:
    """The settings as a run's folder remembers them.

    A key that was added later stands there only where it is not at its default, so that a folder begun before it was
    there is still known.
    """
    tree = to_dict(config)
    if config.tta == "none":
        del tree["tta"]
    return tree


def check_output(config: VisionInferenceConfig) -> None:
    """Both places of the output are named, and the CSV is none of the files that the evidence folder holds.

    Raises:
        ConfigError: one is not, or it is.
    """
    for name in ("csv", "evidence_dir"):
        if not getattr(config.output, name):
            raise ConfigError(f"'output.{name}' is missing; give it in the file, or with --set output.{name}=...")
    csv, folder = Path(config.output.csv).resolve(), Path(config.output.evidence_dir).resolve()
    if csv.parent == folder and csv.suffix.lower() != ".csv":
        raise ConfigError(
            f"output.csv is {config.output.csv}, in the evidence folder, which has files of its own; give it a name "
            "that ends in .csv, or another folder"
        )


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_tree(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: _once(pairs, path))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist; see configs/eval/ for ready ones") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        advice = "; in JSON write a path with / or \\\\" if "escape" in error.msg else ""
        raise ConfigError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}{advice}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected an object with keys such as base_model_path, found {shorten(tree)}")
    return tree


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"{path}: the key '{twice}' stands there twice; keep one")
    return dict(pairs)


def _nested(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """`a.b` keys as sections; a value that is given in both ways must be the same."""
    result: dict[str, Any] = {}

    def put(node: dict[str, Any], parts: list[str], value: Any, name: str) -> None:
        key, *rest = parts
        if rest or isinstance(value, dict):
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{where}: '{name}' goes into '{key}', which is {shorten(child)} and no section")
            for sub, item in {".".join(rest): value}.items() if rest else value.items():
                put(child, str(sub).split("."), item, name)
            return
        if key in node and node[key] != value:
            raise ConfigError(
                f"{where}: '{name}' is given twice, as {shorten(node[key])} and {shorten(value)}; keep one"
            )
        node[key] = value

    for key, value in tree.items():
        put(result, str(key).split("."), value, str(key))
    return result


def _check(config: VisionModelSettings, where: str) -> None:
    needed = {"head_checkpoint": config.head_checkpoint}
    if isinstance(config, VisionEvalConfig):
        needed |= {"ann_eval": config.ann_eval, "inference_output": config.inference_output}
    if missing := [name for name, value in needed.items() if not value]:
        raise ConfigError(f"{where}: '{missing[0]}' is missing; give it in the file or as {missing[0]}=...")
    for name in ("classification_threshold", "heatmap_threshold"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}: '{name}' is {value}; expected a number from 0 to 1")
    counts: dict[str, tuple[int | None, int]] = {
        "batch_size": (config.batch_size, 1),
        "num_workers": (config.num_workers, 0),
        "max_pixels": (config.max_pixels, 1),
    }
    if isinstance(config, VisionEvalConfig):
        counts |= {
            "worst_cases": (config.worst_cases, 0),
            "report_samples": (config.report_samples, 1),
            "max_samples": (config.max_samples, 1),
        }
    if isinstance(config, VisionInferenceConfig):
        counts |= {
            "generation.max_new_tokens": (config.generation.max_new_tokens, 1),
            "max_regions": (config.max_regions, 1),
            "overlay_side": (config.overlay_side, 64),
            "explanation_batch_size": (config.explanation_batch_size, 1),
        }
        _check_text(config, where)
    for name, (count, least) in counts.items():
        if count is not None and count < least:
            raise ConfigError(f"{where}: '{name}' is {count}; expected a whole number from {least} on")


def _check_text(config: VisionInferenceConfig, where: str) -> None:
    generation = config.generation
    if not 0 <= generation.temperature < float("inf"):
        raise ConfigError(f"{where}: 'generation.temperature' is {generation.temperature}; expected a number from 0 on")
    if not 0 < generation.top_p <= 1:
        raise ConfigError(f"{where}: 'generation.top_p' is {generation.top_p}; expected a number above 0, at most 1")
    if not 0 <= config.min_region_area < 1:
        raise ConfigError(f"{where}: 'min_region_area' is {config.min_region_area}; expected a share from 0 to 1")
