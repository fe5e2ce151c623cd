#!/usr/bin/env bash
# The vision stages A, B and C measured on held-out images of the quick start's data: the table of docs/vision.md.
# Offline after the set-up. No run chooses anything on the held-out file: best models are chosen on val.jsonl.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../script/lib.sh"

usage() {
    cat <<'TXT'
usage: bash bench/vision_stages.sh [--quickstart DIR] [--out DIR] [--num-train N] [--further-edits P] [--photos DIR]
                                   [--train-photos DIR] [KEY=VALUE ...]

  --quickstart DIR   output of script/quickstart.sh (default runs/quickstart); it is made if it is not there
  --out DIR          where the stages and their metrics go (default runs/vision_quickstart)
  --num-train N      train on N images made anew from the same photographs (default 24000; 0: the quick start's own,
                     which 4000 steps go over five times and learn by heart)
  --further-edits P  share of tampered ones of these images that have two or three edits (default 0)
  --photos DIR       as it was given to the quick start: what is held out depends on it
  --train-photos DIR further photographs of the images made here, and of the quick start where that is made too
  KEY=VALUE          overrides of configs/train/vision_quickstart.yaml, e.g. stages.b.train.max_steps=2000

Writes DIR/data, DIR/searches, DIR/stage1..3 and DIR/measured_{a,b,c}/metrics.json, and prints a table; resumed when
called again. About two hours on two CPU cores: making images 6 minutes, searching them 15, training 45 to 60.
TXT
}

QUICK="runs/quickstart" OUT="runs/vision_quickstart" IMAGES=24000 EDITS=0 photos=() extra=()
while (($#)); do
    case "$1" in
        --quickstart) QUICK="$(value "$@")"; shift 2 ;;
        --out) OUT="$(value "$@")"; shift 2 ;;
        --num-train) IMAGES="$(value "$@")"; shift 2 ;;
        --further-edits) EDITS="$(value "$@")"; shift 2 ;;
        --photos | --train-photos) named="$(folder "$1" "$(value "$@")")"; photos+=("$1" "$named"); shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *=*) extra+=("$1"); shift ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
done
[[ "$IMAGES" =~ ^[0-9]+$ ]] || fail "--num-train is '$IMAGES', expected a whole number from 0 on"
QUICK="$(absolute "$QUICK")"
OUT="$(absolute "$OUT")"

bash "$ROOT/script/setup.sh" run
use_venv
go_offline
if [[ ! -f "$QUICK/best/best.json" ]]; then bash "$ROOT/script/quickstart.sh" --out "$QUICK" "${photos[@]}"; fi
cd "$ROOT"
if [[ -z "${ACCELERATE_CONFIG:-}" ]] && (($(cpu_count) > 1)) && ! has_gpu; then export ACCELERATE_CONFIG=cpu_ddp; fi
if [[ "${ACCELERATE_CONFIG:-}" == cpu_ddp ]]; then extra=("train.batch_size=4" "${extra[@]}"); fi

if [[ -d "$QUICK/searches" && ! -e "$OUT/searches" ]]; then # a copy: what is added must not change the quick start's
    mkdir -p "$OUT"
    cp -R "$QUICK/searches" "$OUT/searches"
fi

TRAIN="$QUICK/data/train.jsonl"
overrides=("output_dir=$(yaml "$OUT")" "model.path=$(yaml "$QUICK/best")" "data.eval=[$(yaml "$QUICK/data/val.jsonl")]"
    "train.search_cache=$(yaml "$OUT/searches")")
if ((IMAGES > 0)); then # the same photographs are held out whatever the number of images
    TRAIN="$OUT/data/train.jsonl"
    if [[ ! -f "$OUT/data/manifest.json" ]]; then
        forensics synth --out "$OUT/data" --num-train "$IMAGES" --scene-variation 0.75 "${photos[@]}" "further_edits=$EDITS"
    fi
fi
overrides+=("data.train=[$(yaml "$TRAIN")]")
forensics precompute --config configs/train/vision_quickstart.yaml --share 1.0 "${overrides[@]}"

started=$SECONDS
bash script/sft_llm.sh configs/train/vision_quickstart.yaml "${overrides[@]}" "${extra[@]}"
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
