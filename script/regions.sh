#!/usr/bin/env bash
# Candidate regions from raw files to metrics on the tiny model: scan, prepare, build, training, evaluation. Offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/regions.sh [--abnormal DIR] [--normal DIR] [--seconds N] [--seed N] [--out DIR] [--fresh] [--no-region-features]

  --abnormal DIR  images with a .txt of the same name each (default: data/samples/regions); docs/regions.md
                  异常图像及同名 .txt；不给时使用自带样例
  --normal DIR    images without labels, goes with --abnormal / 正常图像，与 --abnormal 同用
  --seconds N     stop training after N seconds (160) / 训练的秒数上限
  --seed N        of the model's weights and of training (0) / 模型权重与训练的随机种子
  --out DIR       where everything is written (default runs/regions) / 输出目录
  --fresh         make everything in --out again; without it the conversations already there are used / 全部重做
  --no-region-features  leave what the tower saw in a box out of the text, to compare / 不使用区域特征，用于对比

Under four minutes on two CPU cores. Writes data/, best/ (the model), report/metrics.json and report/report.html.
TXT
}

ABNORMAL="" NORMAL="" LIMIT=160 SEED=0 OUT="runs/regions" FRESH=0 FEATURES=1
while (($#)); do
    case "$1" in
        --abnormal) ABNORMAL="$(value "$@")"; shift 2 ;;
        --normal) NORMAL="$(value "$@")"; shift 2 ;;
        --seconds) LIMIT="$(value "$@")"; shift 2 ;;
        --seed) SEED="$(value "$@")"; shift 2 ;;
        --out) OUT="$(value "$@")"; shift 2 ;;
        --fresh) FRESH=1; shift ;;
        --no-region-features) FEATURES=0; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
done
is_seconds "$LIMIT"
[[ "$SEED" =~ ^[0-9]+$ ]] || fail "--seed is '$SEED', expected a whole number"
[[ -z "$ABNORMAL" || -d "$ABNORMAL" ]] || fail "--abnormal: no folder '$ABNORMAL'"
[[ -z "$NORMAL" || -d "$NORMAL" ]] || fail "--normal: no folder '$NORMAL'"
[[ -z "$NORMAL" || -n "$ABNORMAL" ]] || fail "--normal goes with --abnormal"
ABNORMAL="$(absolute "$ABNORMAL")" NORMAL="$(absolute "$NORMAL")" OUT="$(absolute "$OUT")"

started=$SECONDS
step() { say "[$1/5, $((SECONDS - started)) s] $2"; }

begin_run "$OUT"
changes=("out_dir=$(yaml "$OUT/data")")
if [[ -n "$ABNORMAL" ]]; then # their types are their own
    changes+=("abnormal_dir=$(yaml "$ABNORMAL")" "normal_dir=$(yaml "$NORMAL")" "label_map={}")
fi

step 1 "labels: $OUT/data/label_stats.json"
forensics regions scan --config configs/data/regions.yaml --set "${changes[@]}"

step 2 "splits, candidates, conversations: $OUT/data"
if [[ -f "$OUT/data/test.jsonl" && $FRESH == 0 ]]; then
    say "already there"
else
    forensics regions prepare --config configs/data/regions.yaml --set "${changes[@]}" --overwrite
    forensics regions build --config configs/data/regions.yaml --set "${changes[@]}" --overwrite
fi

step 3 "tiny Qwen2.5-VL with the words of the training answers: $OUT/tiny"
forensics tiny --out "$OUT/tiny" --corpus "$OUT/data/train.jsonl" --seed "$SEED"

step 4 "training"
options=()
[[ $FEATURES == 1 ]] || options=(model.region_features=false "train.trainable=[lm_full, projector]" "train.muon_groups=[lm_full, projector]")
bash script/sft_llm.sh configs/train/regions_tiny.yaml --overwrite "output_dir=$(yaml "$OUT")" "model.path=$(yaml "$OUT/tiny")" \
    "data.train=[{path: $(yaml "$OUT/data/train.jsonl")}]" "data.eval=[{path: $(yaml "$OUT/data/val.jsonl")}]" \
    "train.max_seconds=$LIMIT" "seed=$SEED" ${options[@]+"${options[@]}"}

step 5 "threshold from the validation split, then the test split"
forensics regions evaluate --model "$OUT/best" --val "$OUT/data/val.jsonl" --test "$OUT/data/test.jsonl" --out "$OUT/report" \
    --batch-size 16 --max-new-tokens 300 --overwrite

say "done in $((SECONDS - started)) s"
say "look at         $OUT/report/report.html"
say "loss curves     .venv/bin/tensorboard --logdir $OUT"
say "the real model  bash script/sft_llm.sh configs/train/regions_phase1.yaml"
