#!/usr/bin/env bash
# Inspects folders of images with vision heads, from a config_inference.json and a few flags; docs/vision_evaluation.md.
set -euo pipefail
VERB=infer
CONFIG=configs/eval/config_inference.json
source "$(dirname "${BASH_SOURCE[0]}")/vision_run_lib.sh"

usage() {
    cat <<'TXT'
Verdict, heat-map overlay and explanation for every image of some folders, into a CSV and an evidence folder
对文件夹中的每张图像给出判定、热图叠加图与文字说明，写入 CSV 与证据目录；中断后重新运行即可继续

usage: bash script/vision_infer.sh [IMAGE ...] [--config JSON] [flags] [KEY=VALUE ...]

  IMAGE                  image files or folders (default: 'images' of the settings) / 图像文件或文件夹
  --config JSON          settings (configs/eval/config_inference.json) / 配置文件
  --model_path PATH      base_model_path: Qwen2.5-VL, hub name or folder / 基座模型
  --head_checkpoint DIR  folder of a stage with heads.safetensors / 某阶段输出的模型目录
  --lora DIR             visual_lora.path: PEFT folder of stage C / 阶段 C 的 LoRA 目录
  --csv FILE             output.csv / 结果表
  --evidence_dir DIR     output.evidence_dir / 证据目录
  --cls_thr P            classification_threshold, 0 to 1 / 整图判定阈值
  --heat_thr P           heatmap_threshold, 0 to 1 / 像素阈值
  --tta HOW              none, hflip, flips, dihedral: average over mirrored copies / 测试时增强
  --language L           zh or en / 证据与内置提示的语言
  --seed N               of drawing prompts and of sampling / 随机种子
  --batch_size N         images at once / 每批图像数
  --num_workers N        threads that read images ahead / 读图线程数
  --no-explain           verdict and heat map only, the language model is not loaded / 不生成文字，不加载语言模型
  --chat                 talk about one IMAGE in the terminal / 在终端中就一张图像对话
  --overwrite            replace the output of another run / 覆盖其他运行的结果
  --dry-run              show the command, do not run it / 只显示命令
  KEY=VALUE              any key of the settings, e.g. overlay_as_second_image=true / 配置中的任意键
TXT
}

declare -A KEYS=(
    [__model_path]=base_model_path [__head_checkpoint]=head_checkpoint [__lora]=visual_lora.path
    [__csv]=output.csv [__evidence_dir]=output.evidence_dir
    [__cls_thr]=classification_threshold [__heat_thr]=heatmap_threshold [__tta]=tta
    [__language]=language [__seed]=seed [__batch_size]=batch_size [__num_workers]=num_workers
)

run_verb "$@"
