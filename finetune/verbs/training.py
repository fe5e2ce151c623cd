"""Verbs that make models: train, precompute, doctor, tiny, merge. Their layers are imported when they run."""

from __future__ import annotations

import argparse

from finetune.errors import ConfigError
from finetune.verbs.argument_types import non_negative, positive, probability, reader_arguments

DTYPES = ("auto", "float32", "bfloat16", "float16")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="e.g. configs/train/quickstart.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. train.max_steps=10 model.path=Qwen/Qwen2.5-VL-3B-Instruct",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last sound checkpoint of output_dir, or start if there is none (train.resume=auto)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="output_dir holds a run: start anew, what it wrote is moved to output_dir/earlier",
    )
    parser.add_argument("--stage", metavar="NAME", help="run this one of the configuration's stages (default: all)")
    parser.set_defaults(handler=_train)


def _train(arguments: argparse.Namespace) -> int:
    from finetune.config import RunConfig, load_config

    if arguments.overwrite and (arguments.resume or arguments.stage):
        other = "--resume goes on with the run" if arguments.resume else "--stage runs one stage"
        raise ConfigError(f"--overwrite starts the whole run anew, {other}; give one of them")
    overrides = [*arguments.overrides, *(["train.resume=auto"] if arguments.resume else [])]
    config: RunConfig = load_config(arguments.config, overrides)  # before the heavy imports: mistakes show at once
    if config.stages and not arguments.stage:
        from finetune.training.stages import run_stages

        return run_stages(config, overwrite=arguments.overwrite)
    from finetune.training.ending import end_process
    from finetune.training.run import train
    from finetune.training.stages import run_stage

    if arguments.stage:
        return end_process(run_stage(config, arguments.stage))
    return end_process(train(config, overwrite=arguments.overwrite).get("exit_status", 0))


def precompute_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a training configuration with train.search_cache"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train")
    parser.add_argument("--seconds", type=non_negative, metavar="N", help="begin no picture after N seconds")
    parser.add_argument(
        "--share",
        type=probability,
        metavar="S",
        help="of the training pictures, twins of generated sets together (default: those similarity_share chooses)",
    )
    parser.add_argument("--workers", type=positive, default=0, metavar="N", help="processes (default: one per core)")
    parser.set_defaults(handler=_precompute)


def _precompute(arguments: argparse.Namespace) -> int:
    from finetune.training.precompute import precompute_command

    return precompute_command(arguments)


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help="check every record of a data file")
    reader_arguments(parser)
    parser.add_argument("--config", metavar="YAML", help="check a training configuration and its data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for --config")
    parser.add_argument("--num-cls", type=positive, default=1, metavar="N", help="cls tokens of the model (default 1)")
    parser.add_argument(
        "--num-mask", type=positive, default=32, metavar="N", help="mask tokens of the model (default 32)"
    )
    parser.add_argument(
        "--hardware",
        metavar="GPUS",
        help="estimate the memory of --config by part, e.g. 2x24GB; reads no data or weights",
    )
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.overrides and not arguments.config:
        raise ConfigError(f"override {arguments.overrides[0]!r} needs --config, the configuration it changes")
    if arguments.hardware and not arguments.config:
        raise ConfigError("--hardware needs --config, the run whose memory is estimated")
    from finetune.training.doctor import doctor_command

    return doctor_command(arguments)


def tiny_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write the checkpoint to: new, empty, or a tiny one"
    )
    parser.add_argument("--seed", type=int, default=0, help="initialises the weights (default 0)")
    parser.add_argument("--untied", action="store_true", help="separate lm_head, as the 7B checkpoint has")
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="DATA",
        help="data files or stored splits whose conversations the tokenizer learns too (default: the project's own)",
    )
    parser.set_defaults(handler=_tiny)


def _tiny(arguments: argparse.Namespace) -> int:
    from finetune.data.corpus import conversation_texts, tokenizer_corpus
    from finetune.models.tiny import TinyShape, build_tiny, check_free

    check_free(arguments.out)
    corpus = [*tokenizer_corpus(), *conversation_texts(arguments.corpus)]
    path = build_tiny(arguments.out, corpus, TinyShape(tie_word_embeddings=not arguments.untied), seed=arguments.seed)
    print(f"wrote a tiny Qwen2.5-VL to {path}")
    return 0


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="base model, or an adapter naming its base")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to merge into --model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; merge_report.json is in it")
    parser.add_argument(
        "--plain", action="store_true", help="plain Qwen2.5-VL (vLLM, transformers) with the heads beside it"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the stored weights (default: the base's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder at --out once done")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weights file (default 5GB)")
    parser.set_defaults(handler=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from finetune.models.export import merge_command

    return merge_command(arguments)
