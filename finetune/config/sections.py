"""Every key of a run's YAML, as dataclasses with defaults and a comment each; and the settings of a predictor.

No torch, no transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

TestTimeAugmentation = Literal["none", "hflip", "flips", "dihedral"]
"""Copies whose logits are averaged: the picture; and left to right; and top to bottom, both; and all transposed."""

ImagePadding = Literal["none", "square"]
"""What images are padded to for the vision tower and the language model."""


@dataclass
class ModelConfig:
    """Which checkpoint is trained and how it is held in memory."""

    path: str = (
        "Qwen/Qwen2.5-VL-3B-Instruct"  # a plain Qwen2.5-VL folder or hub name, or a folder saved by this project
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the checkpoint was saved
    attn_implementation: str = "auto"  # auto: flash_attention_2 where importable on CUDA, else sdpa
    quantization: Literal["none", "nf4"] = "none"  # nf4: QLoRA, needs bitsandbytes
    adapter: str | None = None  # a PEFT folder to start from
    language: Literal["auto", "load", "skip"] = (
        "auto"  # skip: the language model is neither built nor read; auto: skip where the heads need the tower alone
    )
    base: str | None = None  # Qwen2.5-VL under a folder of vision heads; default: the one that the folder names
    region_features: bool = (
        False  # add what the tower saw in each candidate region to the tokens of its id; a folder that has it keeps it
    )


@dataclass
class TokensConfig:
    """How many forensic tokens the tokenizer gains; several cls tokens are spelled `<cls_1>`..`<cls_n>`."""

    num_cls: int = 1
    num_mask: int = 32


@dataclass
class NoiseResidualConfig:
    """The noise-residual expert: a convolutional stream computed from the pixels the vision tower sees."""

    enabled: bool = False
    channels: int = 48  # width of the stream, at 1/4 of the processed image
    widths: list[int] = field(default_factory=lambda: [32, 64, 96])  # of its U-Net at 1/4, 1/8 and 1/16 of the image
    stem_width: int = 0  # hidden width of the layer that reads the statistics; 0: no hidden layer
    global_blocks: int = 2  # attention blocks over a whole image, at 1/16
    content_residuals: bool = False  # also maps of what texture and brightness of the picture do not explain
    exact_repeats: bool = False  # also maps of small patches that the picture holds twice to the last bit
    self_similarity: bool = False  # also search each picture for places that it holds twice (CPU time: see the docs)
    similarity_share: float = 1.0  # of the training pictures that are searched; 0: search_cache's alone are used
    to_language: bool = False  # also add the stream, pooled per merged patch, to the image tokens the LLM reads


@dataclass
class HeadsConfig:
    """Classification and mask head, on the states at the forensic tokens or on the vision tower alone."""

    enabled: bool = True
    source: Literal["tokens", "vision"] = (
        "tokens"  # vision: for every image, from blocks `vision_layers` through a fusion neck; no text is needed
    )
    mask: Literal["query", "grid", "none"] = (
        "query"  # query: token-query decoder over patches; grid: tokens -> grid -> mask; none: only with source vision
    )
    layer: str | int = (
        "last"  # "last", "weighted" (learned weighted sum of all layers) or a layer index (0 = embeddings)
    )
    hidden_size: int = 256  # width of the decoder
    num_layers: int = 2  # cross-attention layers of the query decoder
    num_heads: int = 8
    dropout: float = 0.0
    vision_layers: list[int] = field(default_factory=lambda: [-1])  # tower blocks whose pre-merger patches are decoded
    num_queries: int = 8  # learned queries that take the place of mask tokens with source vision
    grid_size: int = 16  # side of the coarse grid of the `grid` head
    operations: list[str] = field(default_factory=list)  # edits told apart at every place, by names of the records'
    # provenance.operation: splice, or name.kind as retouch.grain; trained by loss.operation; none: no such head
    cls_uses_mask: bool = True  # the image score also reads pooled evidence of the mask branch
    mask_sigmoid: bool = False  # the head itself returns scores in (0, 1) instead of logits
    seed: int = 0  # initialises new heads, independent of the global RNG
    noise_residual: NoiseResidualConfig = field(default_factory=NoiseResidualConfig)


@dataclass
class SourceConfig:
    """One data file or folder: any format of data/README.md."""

    path: str = ""
    format: str = "auto"
    root: str | None = None  # image paths are relative to it; default: the file's own folder
    options: dict[str, Any] = field(default_factory=dict)  # of the format's reader, see data/README.md
    weight: float = 1.0  # relative share in the mixture; 2.0 draws its samples twice as often


@dataclass
class DataConfig:
    """What is trained and evaluated on, and how a record becomes a token sequence."""

    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)
    # zh, en, or the path of a YAML like finetune/data/templates/zh.yaml. A record that names its provenance.language is
    # asked in that one where the template is a built-in one.
    template: str = "zh"
    layout: Literal["tokens_first", "text_first"] = "tokens_first"
    max_length: int = 4096  # tokens; a longer record is an error that names it, image tokens are never cut
    min_pixels: int = 3136  # bounds of the processed image, Qwen2.5-VL's smart resize
    max_pixels: int = 1003520
    image_short_side: int | None = None  # images are resized to this shorter side first; the bounds hold all the same
    # square: each image on a square as wide as its longer side, at its upper left; the bounds are then the square's.
    image_padding: ImagePadding = "none"
    mask_resolution: Literal["processed", "original"] = "processed"  # at which size mask losses are computed
    max_polygon_points: int = 48  # budget of a record's polygons in the answer
    max_polygon_tokens: int | None = None  # their budget in tokens of the model's tokenizer, in place of points
    polygon_coordinates: Literal["absolute", "relative"] = (
        "absolute"  # absolute: pixels of the resized image, as Qwen2.5-VL; relative: 0..1000 of its sides, as Qwen2-VL
    )
    val_ratio: float = 0.0  # share of `train` set aside for evaluation, by group, where `eval` names nothing
    val_seed: int = 0  # decides which groups; the same in every stage of a run
    max_eval_samples: int | None = None
    num_workers: int = 0
    image_cache_megabytes: int = 0  # decoded images each loading process keeps in memory; 0: none
    class_balanced: bool = True  # draw real and tampered equally often
    # Records about candidate regions are drawn mirrored: left and right, or also upside down and turned by a quarter.
    mirror_regions: Literal["none", "horizontal", "all"] = "none"
    shuffle_regions: bool = False  # they are drawn under other ids each time, answers with them
    max_regions: int | None = None  # candidate regions per training record; records to evaluate on are split into parts

    @property
    def has_eval(self) -> bool:
        """Whether the run evaluates at all."""
        return bool(self.eval) or self.val_ratio > 0


@dataclass
class LossConfig:
    """Weights of the loss terms (0 switches one off) and their parameters."""

    text: float = 1.0
    focal: float = 1.0
    dice: float = 1.0
    boundary: float = 0.2
    authentic: float = 1.0
    bce: float = 0.0
    evidence: float = 0.0  # the label against the map's strongest pixels (evi_alpha of the vision scripts)
    sparsity: float = 0.0  # mean of the map on authentic images (sparse_w)
    contrast_region: float = 0.1
    contrast_image: float = 0.0
    operation: float = 0.0  # which of heads.operations made each place, authentic among them
    focal_gamma: float = 2.0
    focal_alpha: float | None = None
    temperature: float = 0.1
    bce_pos_weight: float = 1.0  # of tampered pixels in bce
    cls_pos_weight: float = 1.0  # of tampered images in focal
    operation_authentic_weight: float = 0.3  # of authentic places in operation, tampered ones having 1
    evidence_share: float = 0.02  # of the pixels, the strongest, that `evidence` reads


@dataclass
class LoraConfig:
    """LoRA on the language model; `target_modules` is a regular expression over full module names."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


@dataclass
class VisionLoraConfig:
    """LoRA on blocks of the vision tower (group `vision_lora`); `target_modules` matches names inside a block."""

    blocks: list[int] = field(default_factory=lambda: [-1])  # negative ones count from the end
    r: int = 16
    alpha: int = 32
    target_modules: str = r"attn\.(qkv|proj)|mlp\.(gate|up|down)_proj"


@dataclass
class VisionTopConfig:
    """How much of the vision tower the group `vision_top` unfreezes."""

    blocks: int = 1  # the last n
    merger: bool = False  # and the projector behind them


@dataclass
class TrainConfig:
    """What trains, how long and how fast. `trainer_args` passes any further `transformers.TrainingArguments` on."""

    trainable: list[str] = field(default_factory=lambda: ["new_tokens", "cls_head", "mask_head", "noise_residual"])
    batch_size: int = 1  # per device
    eval_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    epochs: float = 1.0
    max_steps: int = -1  # > 0 overrides epochs
    max_seconds: float | None = None  # wall-clock budget: the schedule is compressed and training stops in time
    learning_rate: float = 1e-4
    group_learning_rates: dict[str, float] = field(default_factory=dict)  # trainable group -> its own rate
    muon_groups: list[str] = field(default_factory=list)  # trainable groups whose matrices Muon trains, not AdamW
    muon_learning_rate: float = 0.02  # of those matrices
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None  # in place of the ratio
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA that has it, else fp32
    gradient_checkpointing: bool = False
    eval_steps: int = 200
    early_stopping_patience: int | None = None  # evaluations without improvement
    metric_for_best: str = "eval_score"
    best_folders: dict[str, str] = field(
        default_factory=dict
    )  # further folders beside best/, each with the metric it is best by, e.g. {best_val_iou: eval_pixel_iou}
    save_total_limit: int = 2
    logging_steps: int = 10
    text_retention: bool = True  # at evaluations, measure how far the text has moved from the base model's
    heatmap_snapshots: int = 0  # of so many evaluation images, drawn at every evaluation under heatmaps/
    feature_cache: Literal[False] | str = (
        False  # off; a folder for the frozen tower's features, which stages may share; auto: output_dir/features
    )
    search_cache: Literal[False] | str = (
        False  # off; a folder for the maps of noise_residual.self_similarity, so that no picture is searched twice
    )
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    resume: str | None = None  # a checkpoint folder, or "auto" for the last one of output_dir
    trainer_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdversarialConfig:
    """Training on inputs that are changed, within a radius, so that the loss rises (FGSM, PGD)."""

    share: float = 0.0  # of the micro-batches that are attacked; 0 switches it off
    target: Literal["features", "pixels"] = "features"  # what the vision tower gives, or what it sees
    method: Literal["fgsm", "pgd"] = "pgd"  # one step of the whole radius, or several smaller ones
    norm: Literal["linf", "l2"] = "linf"  # bound of every value, or of their root mean square over an image
    radius: float = 0.1  # features: in units of their root mean square over the image; pixels: levels of 255
    steps: int = 2  # of pgd; each costs one forward and one backward pass
    step_size: float | None = None  # of pgd, in units of the radius; null: 1.5 / steps
    random_start: bool = True  # pgd begins anywhere within the radius instead of at the input itself


@dataclass
class RegionMaskingConfig:
    """Progressive region masking: cells of tampered and authentic areas are hidden, more and more over training."""

    enabled: bool = False
    start_share: float = 0.0  # of the cells that are hidden before `begin`
    end_share: float = 0.4  # and after `finish`
    begin: float = 0.1  # progress of the run at which the share starts to change
    finish: float = 0.9
    shape: Literal["linear", "cosine", "steps"] = "linear"  # of the change; steps: four equal ones
    probability: float = 0.5  # of the drawn records that are masked at all
    cell: int = 28  # side of a cell, in pixels of the processed image; 28 is one image token
    fill: Literal["mean", "noise", "grey"] = "mean"  # mean: the image's mean colour
    keep_tampered: float = 0.25  # of a tampered area that always stays visible, so that no label becomes wrong


@dataclass
class StageConfig:
    """One stage of `stages`: what differs from the common part. Mappings merge, everything else replaces."""

    name: str = ""
    init_from: str = "previous"  # previous, base, the name of an earlier stage, or the folder of a model or adapter
    seed: int | None = None
    model: dict[str, Any] = field(default_factory=dict)  # dtype, quantization, attn_implementation
    heads: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    vision_lora: dict[str, Any] = field(default_factory=dict)
    vision_top: dict[str, Any] = field(default_factory=dict)
    adversarial: dict[str, Any] = field(default_factory=dict)
    region_masking: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass
class GenerationConfig:
    """How the predictor decides and writes: options of its verbs, not part of a run's YAML."""

    score_threshold: float = 0.5
    mask_threshold: float = 0.5
    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 8
    tta: TestTimeAugmentation = "none"  # the heads read 1, 2 (hflip), 4 (flips) or 8 (dihedral) copies of each image


@dataclass
class RunConfig:
    """One training run: everything `sft_llm.py` reads."""

    output_dir: str = "runs/run"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    vision_lora: VisionLoraConfig = field(default_factory=VisionLoraConfig)
    vision_top: VisionTopConfig = field(default_factory=VisionTopConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    region_masking: RegionMaskingConfig = field(default_factory=RegionMaskingConfig)
    stages: list[StageConfig] = field(default_factory=list)  # one after the other, see finetune/config/stages.py

    @property
    def reads_pictures_only(self) -> bool:
        """Whether it trains on images and their targets alone: no conversation, no language model."""
        return self.heads.enabled and self.heads.source == "vision" and not self.loss.text

    @property
    def loads_language(self) -> bool:
        """Whether the language model is built: `model.language`, decided."""
        return self.model.language == "load" or (self.model.language == "auto" and not self.reads_pictures_only)
