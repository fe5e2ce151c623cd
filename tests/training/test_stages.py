"""Stages: one YAML, one command, each stage moves exactly its groups; restarts, single stages and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune.config import ModelConfig, RunConfig, load_config, stage_runs, to_dict
from finetune.data.validation import InvalidDataError
from finetune.errors import ConfigError
from finetune.models.groups import group_of, plain_name
from finetune.models.loading import load_bundle
from finetune.training.checks import run_problems
from finetune.training.stages import run_stage, run_stages, stage_hash

ROOT = Path(__file__).resolve().parents[2]
HEADS = ["new_tokens", "cls_head", "mask_head", "noise_residual"]
STAGES = [
    {"name": "heads", "train": {"trainable": HEADS}},
    {"name": "language", "train": {"trainable": ["cls_head", "lm_lora"], "learning_rate": 1.0e-2}},
    {
        "name": "vision",
        "train": {"trainable": ["vision_lora"]},
        "vision_lora": {"blocks": [0, 2], "r": 2},
        "loss": {"text": 0.5},
        "adversarial": {"share": 0.5, "steps": 1},
        "region_masking": {"enabled": True, "start_share": 0.3, "begin": 0.0},
    },
]
Write = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a saved folder on its base, under the names of the unwrapped model."""
    model = load_bundle(ModelConfig(path=str(folder), dtype="float32")).model
    kept = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
    return {plain_name(name).replace(".base_layer.", "."): p.detach().clone() for name, p in kept}


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, synth_dir: Path, write_small: Write
) -> tuple[RunConfig, list[dict[str, torch.Tensor]]]:
    """Three stages run in this process, one by one, and the tensors of each stage's `best`."""
    torch.set_num_threads(1)  # fixtures of a module come before the one that sets it for each test
    out = tmp_path_factory.mktemp("three")
    path = write_small(
        out / "run.yaml",
        output_dir=str(out / "run"),
        model={"path": str(tiny_dir)},
        data={split: [str(synth_dir / f"{split}.jsonl")] for split in ("train", "eval")},
        lora={"r": 2, "dropout": 0.0},
        train={"max_steps": 2, "eval_steps": 2},
        stages=STAGES,
    )
    config = load_config(path)
    for stage in STAGES:
        assert run_stage(config, stage["name"]) == 0
    return config, [tensors_of(out / "run" / f"stage{number}" / "best") for number in (1, 2, 3)]


def test_each_stage_moves_exactly_its_groups(three: tuple[RunConfig, list[dict[str, torch.Tensor]]]) -> None:
    """What a stage does not name keeps its bits; what it names moves; what it adds is there from then on."""
    _, states = three
    for number in (1, 2):
        before, after = states[number - 1], states[number]
        groups = STAGES[number]["train"]["trainable"]
        assert before.keys() <= after.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(group_of(name, groups) for name in moved), moved
        new = after.keys() - before.keys()
        assert new
        assert all(".lora_" in name and group_of(name, groups) for name in new)
        for group in groups:
            own = {name for name in after if group_of(name, [group])}
            assert (own & moved) or (own & new and any(bool(after[n].any()) for n in own if "lora_B" in n))
    assert {name.split(".")[3] for name in states[2].keys() - states[1].keys()} == {"0", "2"}


def test_every_stage_has_its_folder(three: tuple[RunConfig, Any], tiny_dir: Path) -> None:
    out = Path(three[0].output_dir)
    for number, stage in enumerate(STAGES, start=1):
        folder = out / f"stage{number}"
        marker = json.loads((folder / "stage.json").read_text())
        assert (marker["name"], marker["finished"], marker["steps"]) == (stage["name"], True, 2)
        table = (folder / "trainable.txt").read_text().splitlines()
        assert [line.split()[0] for line in table[1:-1]] == stage["train"]["trainable"]
        adapter = json.loads((folder / "best" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tiny_dir)  # each stands on the original base
    last = load_config(out / "stage3" / "config.yaml")
    assert (last.loss.text, last.loss.focal, last.adversarial.share) == (0.5, 1.0, 0.5)
    assert last.model.adapter == str(out / "stage2" / "best")


def test_finished_stages_are_passed_over_and_the_best_is_linked(
    three: tuple[RunConfig, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started: the driver only looks, prints its summary and links."""
    config, _ = three
    out = Path(config.output_dir)
    assert run_stages(config) == 0
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 3
    assert "vision" in printed.splitlines()[-1]
    assert (out / "best").resolve() == (out / "stage3" / "best").resolve()
    assert not os.path.isabs(os.readlink(out / "best"))
    moved = out.with_name("moved")
    shutil.copytree(out, moved, symlinks=True)
    assert load_bundle(ModelConfig(path=str(moved / "best"), dtype="float32"))
    assert (
        stage_hash(stage_runs(config), stage_runs(config)[2])
        == json.loads((moved / "stage3/stage.json").read_text())["hash"]
    )


def test_stages_of_before_a_section_was_removed_are_known_again(tmp_path: Path) -> None:
    """The hashes that a version with the section `generation` wrote into stage.json for this configuration."""
    path = tmp_path / "s.yaml"
    stages = "stages:\n  - name: a\n    train: {max_steps: 5}\n  - name: b\n    init_from: a\n"
    path.write_text(f"output_dir: runs/x\nmodel: {{path: tiny}}\n{stages}", encoding="utf-8")
    runs = stage_runs(load_config(path))
    assert [stage_hash(runs, run) for run in runs] == ["41692b3156fb", "84c163430261"]


def test_another_configuration_in_the_same_folder_is_refused(three: tuple[RunConfig, Any], tmp_path: Path) -> None:
    """A change of stage 1 is one of all the stages that start from it."""
    tree = to_dict(three[0])
    tree["stages"][0]["train"]["learning_rate"] = 0.5
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    changed = load_config(path)
    for name in ("heads", "vision"):
        with pytest.raises(ConfigError, match="of another configuration"):
            run_stage(changed, name)


# ---- the driver ----


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "sft_llm.py"), "--config", str(path), *more]


def environment() -> dict[str, str]:
    """One thread, as in this process: MKL adds up in another order with two."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_with_one_command_survive_a_kill(write_config: Write, tmp_path: Path) -> None:
    """Killed in the second stage, the same command goes on there; the end is that of a run that went through."""
    section = {"max_steps": 4, "eval_steps": 1, "save_total_limit": 10}
    stages = [{"name": "one"}, {"name": "two", "train": {"learning_rate": 5.0e-4}}]
    changes: dict[str, Any] = {"train": {**section, "trainable": HEADS}, "stages": stages}
    through, killed = write_config("through", **changes), write_config("killed", **changes)
    for stage in stages:
        assert run_stage(load_config(through), stage["name"]) == 0
    process = subprocess.Popen(command(killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (tmp_path / "killed" / "stage2" / "checkpoint-2").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command(killed), env=environment(), capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "stage 1/2 'one' is finished" in again.stdout
    states = [tensors_of(tmp_path / name / "stage2" / "checkpoint-4") for name in ("through", "killed")]
    assert all(torch.equal(states[0][name], values) for name, values in states[1].items())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["cpu_ddp", "zero2_cpu"])
def test_stages_under_a_launcher(launcher: str, write_config: Write, tmp_path: Path) -> None:
    """Two ranks: each stage meets at a rendezvous of its own; attacks and masking included."""
    section = {"max_steps": 2, "eval_steps": 2, "trainable": HEADS}
    changes: dict[str, Any] = {"train": section, "lora": {"r": 2}, "stages": STAGES}
    path = write_config("run", **changes)
    tools = ROOT / ".venv" / "bin"
    accelerate = str(tools / "accelerate") if (tools / "accelerate").is_file() else "accelerate"
    file = ROOT / "configs" / "accelerate" / f"{launcher}.yaml"
    launch = [accelerate, "launch", "--quiet", "--config_file", str(file), "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, *command(path)[1:]],
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("trained 2 steps") == 3  # one rank speaks, in every stage
    for number in (1, 2, 3):  # and there are two of them
        states = {path.name for path in (tmp_path / "run" / f"stage{number}" / "checkpoint-2").glob("rng_state*")}
        assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert (tmp_path / "run" / "best" / "adapter_config.json").is_file()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"train": {}}], "stage 1 of 1 has no name"),
        ([{"name": "a"}, {"name": "a"}], "two stages are called 'a'"),
        ([{"name": "base"}], "cannot be called 'base'"),
        ([{"name": "a", "init_from": "nowhere"}], "init_from is 'nowhere', which is neither previous, base"),
        (
            [{"name": "a"}, {"name": "b", "init_from": "/"}],
            r"init_from is .*, which holds neither a model \(config.json\) nor",
        ),
        ([{"name": "a", "init_from": "b"}, {"name": "b"}], "init_from names 'b', which comes later"),
        ([{"name": "a", "init_from": "a"}], "init_from names the stage itself"),
        ([{"name": "a", "trian": {}}], r"unknown key 'stages\[0\].trian' .*did you mean 'train'"),
        ([{"name": "a", "train": {"learning_rat": 1}}], "stage 'a': unknown key 'train.learning_rat'"),
        ([{"name": "a", "model": {"path": "x"}}], "a stage cannot set model.path; use init_from"),
        ([{"name": "a", "tokens": {}}], r"unknown key 'stages\[0\].tokens'"),
    ],
)
def test_wrong_stages_are_one_line(stages: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "two"], "error: stage 'two' starts from stage 'one', which is not finished in"),
        (["--stage", "twoo"], "error: --stage twoo: there is no such stage; stages: one, two"),
        (["stages.two.train.trainable=[cls_haed]"], "error: stage 'two': train.trainable names 'cls_haed'; did you"),
        (["stages.tow.train.max_steps=1"], "there is no stage 'tow'; stages: one, two"),
        (["stages=[]", "--stage", "one"], "error: --stage one: this configuration has no stages"),
        (["stages.two.data.train=[nowhere.jsonl]"], "error: (nowhere.jsonl): data file not found"),
        (["stages.two.data.eval=[nowhere.jsonl]"], "error: (nowhere.jsonl): data file not found"),
    ],
)
def test_wrong_command_is_one_line(
    arguments: list[str], message: str, write_config: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from finetune.cli import train_main

    path = write_config("run", stages=[{"name": "one"}, {"name": "two"}])
    with pytest.raises(SystemExit) as stopped:
        train_main(["--config", str(path), *arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in captured.err
    assert captured.err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_attack_under_zero3_is_refused_before_the_first_stage(
    write_config: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    config = load_config(write_config("run", stages=STAGES, lora={"r": 2}))
    with pytest.raises(ConfigError, match="stage 'vision': adversarial training runs the model a second time"):
        run_stages(config)
    assert not (tmp_path / "run").exists()


def test_data_of_a_later_stage_are_looked_at_before_the_first(
    write_config: Write, synth_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the doctor too; what the first stage reads itself is left to it."""
    from finetune.training.doctor import check_config
    from finetune.training.stage_data import configs_of, files_read

    records = [json.loads(line) for line in (synth_dir / "train.jsonl").read_text().splitlines()[:4]]
    records[2]["images"] = ["not_there.png"]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"path": str(tmp_path / "bad.jsonl"), "root": str(synth_dir)}
    config = load_config(write_config("run", stages=[{"name": "one"}, {"name": "two", "data": {"train": [source]}}]))
    with pytest.raises(InvalidDataError, match=r"(?s)1 problems in 1 of 4 records.*not_there\.png"):
        run_stages(config)
    assert not (tmp_path / "run").exists()
    (problem,) = [problem for problem in check_config(config) if problem.severity == "error"]
    assert "not_there.png" in problem.message
    assert "bad.jsonl: 4 records" in capsys.readouterr().out
    files = [(read.what, Path(read.source.path).name) for read in files_read(configs_of(config))]
    assert files == [("train", "train.jsonl"), ("eval", "eval.jsonl"), ("train", "bad.jsonl")]


# ---- overrides, and the ready configurations ----


def test_overrides_win_over_stages() -> None:
    path = ROOT / "configs" / "train" / "three_stages_3b.yaml"
    config = load_config(path, ["train.learning_rate=1", "stages.stage3.train.epochs=7", "lora.r=4"])
    runs = [run.config for run in stage_runs(config)]
    assert [run.train.learning_rate for run in runs] == [1.0, 1.0, 1.0]
    assert [run.train.epochs for run in runs] == [3, 2, 7]
    assert [run.lora.r for run in runs] == [4, 4, 4]
    assert [run.output_dir for run in runs] == [f"runs/three_stages_3b/stage{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("size", ["tiny", "3b", "7b"])
def test_three_stages_are_the_single_ones(size: str) -> None:
    """What is written twice, for reading, says the same."""
    folder = ROOT / "configs" / "train"
    for number, run in enumerate(stage_runs(load_config(folder / f"three_stages_{size}.yaml")), start=1):
        single = to_dict(load_config(folder / f"stage{number}_{size}.yaml"))
        ours = to_dict(run.config)
        assert single["model"].pop("adapter") == (None if number == 1 else f"runs/stage{number - 1}_{size}/best")
        ours["model"].pop("adapter")
        if number == 1:  # the common part names LoRA for later stages
            ours["lora"] = single["lora"]
        assert {k: v for k, v in ours.items() if k != "output_dir"} == {
            k: v for k, v in single.items() if k != "output_dir"
        }


READY = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("stage3_7b", "three_stages_tiny") else pytest.mark.slow) for n in READY]
)
def test_every_ready_configuration_takes_two_steps(
    name: str, tiny_dir: Path, tiny_untied_dir: Path, synth_dir: Path, tmp_path: Path
) -> None:
    """On the tiny model, tied or not as the real one is; smaller are only heads, images and the number of steps."""
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"model.path={tiny_untied_dir if '7b' in name else tiny_dir}",
        "model.adapter=null",
        f"data.train=[{synth_dir / 'train.jsonl'}]",
        f"data.eval=[{synth_dir / 'eval.jsonl'}]",
        "data.min_pixels=3136",
        "data.max_pixels=12544",
        "data.num_workers=0",
        "heads.hidden_size=16",
        "heads.num_heads=2",
        "heads.num_layers=1",
        "heads.noise_residual={enabled: true, channels: 8, widths: [8, 8, 8], global_blocks: 1}",
        "train.max_steps=2",
        "train.eval_steps=2",
        "train.gradient_accumulation_steps=1",
        "train.batch_size=2",
        "train.report_to=[]",
    ]
    if name.startswith("vision"):  # from a plain model; that they start from each other is test_vision_runs' part
        overrides += ["model.base=null", "heads.vision_layers=[0, 1]", "vision_lora.blocks=[0, 1]"]
        overrides += ["train.feature_cache=false", "train.search_cache=false"]
    if name == "regions_phase2":
        overrides += ["freeze.vision_tower=lora_top_2"]
    if "qlora" in name:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra `qlora`")
    config = load_config(ROOT / "configs" / "train" / f"{name}.yaml", overrides)
    assert run_problems(config) == []
    from finetune.training.run import train

    if not config.stages:
        assert train(config)["steps"] == 2
        return
    for stage in config.stages:
        assert run_stage(config, stage.name) == 0
