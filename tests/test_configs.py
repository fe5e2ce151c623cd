"""Test 12 of the main job: every YAML under configs/ loads, every documented command parses, ready runs run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from finetune.cli import build_parser
from finetune.config import RunConfig, load_config, to_dict
from finetune.errors import ForensicsError

ROOT = Path(__file__).resolve().parents[1]
TRAIN_CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
DATA_CONFIGS = sorted((ROOT / "configs" / "data").glob("*.yaml"))
ACCELERATE_CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
OTHER_PROGRAMS = {"cd", "git", "ls", "pip", "pre-commit", "source", "tensorboard"}
"""Programs of others that the documentation may call; nothing of ours to check in them."""


def test_there_is_something_to_check() -> None:
    assert {"quickstart", "stage1_3b", "stage1_7b", "stage2_lora_3b"} <= {path.stem for path in TRAIN_CONFIGS}
    plain = {"cpu", "cpu_ddp", "single_gpu", "ddp", "multi_node"}
    divided = {f"zero{stage}{variant}" for stage in (2, 3) for variant in ("", "_cpu", "_offload")}
    assert plain | divided == {path.stem for path in ACCELERATE_CONFIGS}


@pytest.mark.parametrize("path", TRAIN_CONFIGS, ids=lambda path: path.stem)
def test_train_config_loads_and_is_sound(path: Path) -> None:
    from finetune.training.checks import run_problems

    config = load_config(path)
    assert run_problems(config) == []
    assert config.output_dir == f"runs/{path.stem}"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|work|data|mnt|Users)/", text), "a path of one machine"
    assert to_dict(config) != to_dict(RunConfig())


@pytest.mark.parametrize("path", DATA_CONFIGS, ids=lambda path: path.stem)
def test_data_config_loads_and_is_sound(path: Path) -> None:
    from finetune.data.preparation.config import PrepareConfig, check
    from finetune.data.synthesis.config import load_synth_config

    kind = path.stem.split("_")[0]
    if kind == "prepare":
        check(load_config(path, [], PrepareConfig))
    elif kind == "reports":
        from finetune.data.reports.settings import load_reports_config
        from finetune.data.reports.template import load_report_template

        settings = load_reports_config(str(path), []).table
        load_report_template(settings.template, list(settings.fields))
    elif kind == "regions":
        from finetune.data.regions.settings import load_regions_config

        load_regions_config(str(path), [])
    else:
        assert kind == "synth", "configs/data holds prepare_*.yaml, regions.yaml, reports.yaml and synth_*.yaml"
        load_synth_config(path)


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_loads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # raises for an unknown key
    assert (config.num_processes > 1) == (
        str(config.distributed_type).endswith(("DEEPSPEED", "MULTI_GPU", "MULTI_CPU"))
    )
    assert config.use_cpu == ("cpu" in path.stem)
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    deepspeed = config.deepspeed_config or {}
    stage = {"z": int(path.stem[4]) if path.stem[4:5].isdigit() else None, "m": 2}.get(path.stem[0])
    assert deepspeed.get("zero_stage") == stage
    if stage is not None:
        is_offloaded = "offload" in path.stem
        assert deepspeed["offload_optimizer_device"] == ("cpu" if is_offloaded else "none")
        assert deepspeed["offload_param_device"] == ("cpu" if is_offloaded and stage == 3 else "none")
        assert deepspeed.get("zero3_save_16bit_model", False) == (stage == 3)  # else checkpoints have no safetensors
        assert deepspeed["zero3_init_flag"] is False


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of every bash block; continued lines joined, comments dropped."""
    found = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        for block in re.findall(
            r"^```(?:bash|sh|shell)\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.strip().startswith("#"):
                    found.append((document.name, line.strip()))
    return found


def check_command(line: str) -> None:
    """Raise (or exit, as argparse does) if a documented command could not run from the repository's root."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        if name == "ACCELERATE_CONFIG":
            assert (ROOT / "configs" / "accelerate" / f"{value}.yaml").is_file() or (ROOT / value).is_file(), value
    program, *arguments = words
    if program == "accelerate":
        assert arguments[0] == "launch"
        script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
        config_file = arguments[arguments.index("--config_file") + 1]
        assert (ROOT / config_file).is_file(), config_file
        program, arguments = "python", arguments[script:]
    if program == "forensics":
        check_verb(arguments)
    elif program == "python" and arguments[0] == "sft_llm.py":
        check_verb(["train", *arguments[1:]])
    elif program == "python":
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), arguments[0]
    elif program == "bash":
        script_path = ROOT / arguments[0]
        assert script_path.is_file(), arguments[0]
        if script_path.name == "sft_llm.sh":
            check_verb(["train", "--config", *arguments[1:]])
        text = script_path.read_text("utf-8")
        handed_on = re.search(r'sft_llm\.sh" "\$here/\.\./(\S+\.yaml)" "\$@"', text)
        if handed_on:  # all its arguments are those of sft_llm.sh
            check_verb(["train", "--config", handed_on[1], *arguments[1:]])
            return
        if "vision_lib.sh" in text or "vision_run_lib.sh" in text:  # its flags are those of its --help
            text = subprocess.run(["bash", str(script_path), "--help"], capture_output=True, text=True).stdout
            text = re.sub(r"(--[\w-]+)", r"\1)", text)
        for option in (word for word in arguments[1:] if word.startswith("--")):
            assert f"{option})" in text or f"{option} |" in text or f"{option}=" in text, f"{arguments[0]} {option}"
    else:
        assert program in OTHER_PROGRAMS, f"unknown program '{program}'"


def check_verb(arguments: list[str]) -> None:
    """Arguments of `forensics`; a configuration they name is loaded with their overrides."""
    parsed = build_parser().parse_args(arguments)
    if getattr(parsed, "config", None):
        path = ROOT / parsed.config
        if arguments[0] == "synth":
            from finetune.data.synthesis.config import load_synth_config

            load_synth_config(path, parsed.overrides)
        elif arguments[0] == "prepare":
            from finetune.data.preparation.config import PrepareConfig

            load_config(path, parsed.overrides, PrepareConfig)
        elif arguments[0] == "reports":
            from finetune.data.reports.settings import load_reports_config

            load_reports_config(str(path), parsed.overrides)
        elif arguments[0] == "regions":
            from finetune.data.regions.settings import load_regions_config

            load_regions_config(str(path), parsed.overrides)
        elif arguments[0] == "vision":
            from finetune.config.vision_runs import VisionEvalConfig, VisionInferenceConfig, load_vision_config

            schema = VisionEvalConfig if arguments[1] == "evaluate" else VisionInferenceConfig
            load_vision_config(path, parsed.overrides, schema)
        else:
            load_config(path, parsed.overrides)


@pytest.mark.parametrize(("document", "line"), commands(), ids=lambda value: value[:60])
def test_documented_command_parses(document: str, line: str) -> None:
    check_command(line)


def test_both_readmes_have_commands() -> None:
    documents = [document for document, _ in commands()]
    for name in ("README.md", "README_zh.md"):
        assert documents.count(name) >= 5 or not (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "line",
    [
        "forensics trian --config configs/train/quickstart.yaml",
        "forensics predict --modle x a.jpg",
        "forensics synth --config configs/data/synth_default.yaml --out x num_trian=3",
        "bash script/sft_llm.sh configs/train/nothing.yaml",
        "bash script/sft_llm.sh configs/train/quickstart.yaml train.max_step=3",
        "bash script/quickstart.sh --secnods 3",
        "ACCELERATE_CONFIG=zero9 bash script/sft_llm.sh configs/train/quickstart.yaml",
        "accelerate launch --config_file configs/accelerate/none.yaml sft_llm.py --config configs/train/stage1_3b.yaml",
        "python bench/nothing.py",
        "forensic doctor",
    ],
)
def test_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises((SystemExit, AssertionError, ForensicsError)):
        check_command(line)


# ---- the ready configurations run, on the tiny model ----


@pytest.mark.parametrize("name", ["stage1_3b", "stage1_7b", "stage2_lora_3b"])
def test_ready_run_works_on_the_tiny_model(
    name: str, tiny_dir: Path, tiny_untied_dir: Path, photo_records: Path, tmp_path: Path
) -> None:
    """In bf16 with gradient checkpointing, as written; smaller are only heads, images and the number of steps."""
    import torch

    from finetune.config import ModelConfig
    from finetune.models.loading import load_bundle
    from finetune.training.run import train

    torch.set_num_threads(1)
    model = tiny_untied_dir if "7b" in name else tiny_dir  # as the released ones are
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"model.path={model}",
        f"data.train=[{photo_records}]",
        f"data.eval=[{photo_records}]",
        "data.max_pixels=12544",
        "data.num_workers=0",
        "heads.hidden_size=16",
        "heads.num_heads=2",
        "heads.noise_residual={enabled: true, channels: 8, widths: [8, 8, 8], global_blocks: 1}",
        "train.max_steps=2",
        "train.gradient_accumulation_steps=2",
        "train.logging_steps=1",
        "train.report_to=[]",
    ]
    config = load_config(ROOT / "configs" / "train" / f"{name}.yaml", overrides)
    assert config.train.precision == "bf16"
    assert config.train.gradient_checkpointing
    record = train(config)
    assert record["steps"] == 2
    assert 0 <= record["best"] <= 1
    bundle = load_bundle(ModelConfig(path=str(tmp_path / "run" / "best")))
    assert bundle.model is not bundle.base  # an adapter folder
    assert any("lora_" in key for key, _ in bundle.model.named_parameters()) == ("lora" in name)
    table = (tmp_path / "run" / "trainable.txt").read_text()
    assert all(re.search(rf"^{group} +\d", table, re.MULTILINE) for group in config.train.trainable)


def test_the_vision_quick_start_takes_over_the_quick_starts_stream() -> None:
    """Its weights fit one shape only; another one would silently begin from random values."""
    from dataclasses import replace

    quick, vision = (load_config(ROOT / "configs" / "train" / f"{n}quickstart.yaml").heads for n in ("", "vision_"))
    shared = replace(quick.noise_residual, to_language=False, similarity_share=1.0)  # these two change no shape
    assert replace(vision.noise_residual, similarity_share=1.0) == shared
