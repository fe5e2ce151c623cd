#!/usr/bin/env bash
# Evaluates vision heads on an annotated set, from a config_eval.json and a few flags; docs/vision_evaluation.md.
set -euo pipefail
VERB=evaluate
CONFIG=configs/eval/config_eval.json
source "$(dirname "${BASH_SOURCE[0]}")/vision_run_lib.sh"

usage() {
    cat <<'TXT'
Metrics, predictions, curves, threshold tables and the worst cases of a vision stage
对视觉阶段的模型做评测：指标、逐样本预测、ROC/PR 曲线、阈值表、最差样例

usage: bash script/vision_eval.sh [--config JSON] [flags] [KEY=VALUE ...]

  --config JSON          settings (configs/eval/config_eval.json) / 配置文件
  --model_path PATH      base_model_path: Qwen2.5-VL, hub name or folder / 基座模型
  --head_checkpoint DIR  folder of a stage with heads.safetensors / 某阶段输出的模型目录
  --lora DIR             visual_lora.path: PEFT folder of stage C / 阶段 C 的 LoRA 目录
  --ann_eval FILE        annotation: JSON list of image_path, mask_path, label / 标注文件
  --data_root DIR        paths of the annotation are relative to it / 标注中路径的根目录
  --out_dir DIR          inference_output, where everything is written / 输出目录
  --metrics_csv FILE     table of the metrics (default: metrics.csv in --out_dir) / 指标表
  --cls_thr P            classification_threshold, 0 to 1 / 整图判定阈值
  --heat_thr P           heatmap_threshold, 0 to 1 / 像素阈值
  --batch_size N         images at once / 每批图像数
  --num_workers N        threads that read images ahead / 读图线程数
  --tta HOW              none, hflip, flips, dihedral: average over mirrored copies / 测试时增强
  --overwrite            replace an earlier evaluation there / 覆盖已有结果
  --dry-run              show the command, do not run it / 只显示命令
  KEY=VALUE              any key of the settings, e.g. worst_cases=50 / 配置中的任意键
TXT
}

declare -A KEYS=(
    [__model_path]=base_model_path [__head_checkpoint]=head_checkpoint [__lora]=visual_lora.path
    [__ann_eval]=ann_eval [__data_root]=data_root [__out_dir]=inference_output [__metrics_csv]=metrics_csv
    [__cls_thr]=classification_threshold [__heat_thr]=heatmap_threshold [__tta]=tta
    [__batch_size]=batch_size [__num_workers]=num_workers
)

run_verb "$@"
