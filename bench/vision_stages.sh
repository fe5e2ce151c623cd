#!/usr/bin/env bash
# The vision stages A, B and C measured on held-out images of the quick start's data: the table of docs/vision.md.
# Offline after the set-up. No run chooses anything on the held-out file: best models are chosen on val.jsonl.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../script/lib.sh"

usage() {
    cat <<'TXT'
usage: bash bench/vision_stages.sh [--quickstart DIR] [--out DIR] [KEY=VALUE ...]

  --quickstart DIR   output of script/quickstart.sh (default runs/quickstart); it is made if it is not there
  --out DIR          where the stages and their metrics go (default runs/vision_quickstart)
  KEY=VALUE          overrides of configs/train/vision_quickstart.yaml, e.g. stages.b.train.max_steps=2000

Writes DIR/stage1..3 and DIR/measured_{a,b,c}/metrics.json, and prints a table; resumed when called again.
TXT
}

QUICK="runs/quickstart" OUT="runs/vision_quickstart" extra=()
while (($#)); do
    case "$1" in
        --quickstart) QUICK="${2:?--quickstart needs a value}"; shift 2 ;;
        --out) OUT="${2:?--out needs a value}"; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *=*) extra+=("$1"); shift ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
done
QUICK="$(absolute "$QUICK")"
OUT="$(absolute "$OUT")"

bash "$ROOT/script/setup.sh" run
use_venv
go_offline
if [[ ! -f "$QUICK/best/best.json" ]]; then bash "$ROOT/script/quickstart.sh" --out "$QUICK"; fi
cd "$ROOT"
if [[ -z "${ACCELERATE_CONFIG:-}" ]] && (($(cpu_count) > 1)) && ! has_gpu; then export ACCELERATE_CONFIG=cpu_ddp; fi
if [[ "${ACCELERATE_CONFIG:-}" == cpu_ddp ]]; then extra=("train.batch_size=4" "${extra[@]}"); fi

if [[ -d "$QUICK/searches" && ! -e "$OUT/searches" ]]; then # a copy: what is added must not change the quick start's
    mkdir -p "$OUT"
    cp -R "$QUICK/searches" "$OUT/searches"
fi

started=$SECONDS
bash script/sft_llm.sh configs/train/vision_quickstart.yaml "output_dir=$(yaml "$OUT")" \
    "model.path=$(yaml "$QUICK/best")" "data.train=[$(yaml "$QUICK/data/train.jsonl")]" \
    "data.eval=[$(yaml "$QUICK/data/val.jsonl")]" "train.search_cache=$(yaml "$OUT/searches")" "${extra[@]}"
say "trained in $((SECONDS - started)) s"

number=0
for stage in a b c; do
    number=$((number + 1))
    forensics evaluate --model "$OUT/stage$number/best" --data "$QUICK/data/eval.jsonl" --out "$OUT/measured_$stage" \
        --batch-size 16 --no-text --no-baselines --no-calibration
done
python - "$OUT" <<'PY'
import json
import sys
from pathlib import Path

print("stage  AUROC  accuracy  ECE    pixel F1  IoU    false-positive area")
for stage in "abc":
    found = json.loads((Path(sys.argv[1]) / f"measured_{stage}" / "metrics.json").read_text())
    image, pixel, real = found["image"], found.get("localization") or {}, found.get("authentic") or {}
    values = [image["auroc"], image["accuracy"], image["ece"], pixel.get("f1"), pixel.get("iou"), real.get("false_positive_area")]
    shown = ["-" if value is None or (stage == "a" and place > 2) else f"{value:.3f}" for place, value in enumerate(values)]
    print(f"{stage.upper():<6} {shown[0]:<6} {shown[1]:<9} {shown[2]:<6} {shown[3]:<9} {shown[4]:<6} {shown[5]}")
PY
