#!/usr/bin/env bash
# Inspection reports from raw files to metrics on the tiny model: table, stored set, training, reports, comparison. Offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/reports.sh [--csv TABLE] [--images DIR] [--seconds N] [--out DIR] [--fresh]

  --csv TABLE    your own table in the default columns (default: 600 drawn walls); docs/reports.md
                 自己的表格（默认列名）；不给时绘制 600 张墙面
  --images DIR   image paths of the table are relative to it (default: the table's folder) / 图像路径的根目录
  --seconds N    stop training after N seconds (240) / 训练的秒数上限
  --out DIR      where everything is written (default runs/reports) / 输出目录
  --fresh        make everything in --out again; without it the stored set already there is used / 全部重做

Under four minutes on two CPU cores. Writes data/, best/ (the model), report/results.json and report/report.html.
TXT
}

CSV="" IMAGES="" LIMIT=240 OUT="runs/reports" FRESH=0
while (($#)); do
    case "$1" in
        --csv) CSV="$(value "$@")"; shift 2 ;;
        --images) IMAGES="$(value "$@")"; shift 2 ;;
        --seconds) LIMIT="$(value "$@")"; shift 2 ;;
        --out) OUT="$(value "$@")"; shift 2 ;;
        --fresh) FRESH=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
done
is_seconds "$LIMIT"
[[ -z "$CSV" || -f "$CSV" ]] || fail "--csv: no file '$CSV'"
[[ -z "$IMAGES" || -n "$CSV" ]] || fail "--images goes with --csv"
CSV="$(absolute "$CSV")" IMAGES="$(absolute "$IMAGES")" OUT="$(absolute "$OUT")"

started=$SECONDS
step() { say "[$1/4, $((SECONDS - started)) s] $2"; }

begin_run "$OUT"

step 1 "table to stored set: $OUT/data"
if [[ -f "$OUT/data/manifest.json" && $FRESH == 0 ]]; then
    say "already there"
else
    if [[ -z "$CSV" ]]; then
        forensics reports samples --out "$OUT/raw" --num 600 --overwrite
        CSV="$OUT/raw/table.csv"
    fi
    forensics reports prepare --config configs/data/reports.yaml --csv "$CSV" ${IMAGES:+--images "$IMAGES"} --out "$OUT/data" \
        --format parquet --overwrite --preview 1
fi

step 2 "tiny Qwen2.5-VL with the words of the training reports: $OUT/tiny"
forensics tiny --out "$OUT/tiny" --corpus "$OUT/data/train"

step 3 "training"
bash script/sft_llm.sh configs/train/reports_tiny.yaml --overwrite "output_dir=$(yaml "$OUT")" "model.path=$(yaml "$OUT/tiny")" \
    "data.train=[{path: $(yaml "$OUT/data/train")}]" "data.eval=[{path: $(yaml "$OUT/data/val")}]" "train.max_seconds=$LIMIT"

step 4 "reports for the test split, beside the true ones"
forensics reports infer "$OUT/data/test" --config configs/data/reports.yaml --model "$OUT/best" --out "$OUT/report" \
    --compare-gt --batch-size 32 --max-new-tokens 200

say "done in $((SECONDS - started)) s"
say "look at         $OUT/report/report.html"
say "loss curves     .venv/bin/tensorboard --logdir $OUT"
say "the real model  bash script/reports_zero2.sh model.path=/path/to/Qwen2.5-VL-3B-Instruct"
