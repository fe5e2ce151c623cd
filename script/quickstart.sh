#!/usr/bin/env bash
# The main job from nothing: tiny model, synthesised tampering, training, evaluation, report. Offline after the set-up.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/quickstart.sh [--photos DIR] [--train-photos DIR] [--seconds N] [--out DIR] [--fresh]

  --photos DIR        tamper with your own photographs (default: those shipped in scikit-image, scikit-learn, matplotlib)
  --train-photos DIR  train on these photographs too; what is evaluated stays the same
  --seconds N         stop training after N seconds (default: as configs/train/quickstart.yaml says)
  --out DIR           where everything is written (default runs/quickstart)
  --fresh             build the tiny model, the data and the searches again; without it those already in --out are used

About fifteen minutes on two CPU cores. Writes best/ (the model), metrics.json, predictions.jsonl, report.html.
TXT
}

PHOTOS="" TRAIN_PHOTOS="" LIMIT="" OUT="runs/quickstart" FRESH=0
while (($#)); do
    case "$1" in
        --photos) PHOTOS="$(value "$@")"; shift 2 ;;
        --train-photos) TRAIN_PHOTOS="$(value "$@")"; shift 2 ;;
        --seconds) LIMIT="$(value "$@")"; shift 2 ;;
        --out) OUT="$(value "$@")"; shift 2 ;;
        --fresh) FRESH=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown argument '$1'" ;;
    esac
done
if [[ -n "$LIMIT" ]]; then is_seconds "$LIMIT"; fi
PHOTOS="$(folder --photos "$PHOTOS")"
TRAIN_PHOTOS="$(folder --train-photos "$TRAIN_PHOTOS")"
OUT="$(absolute "$OUT")"

started=$SECONDS
step() { say "[$1/6, $((SECONDS - started)) s] $2"; }

step 1 "environment"
begin_run "$OUT"

# What this script has made in --out is noted in .quickstart, so that nothing else is ever reused or removed.
NOTES="$OUT/.quickstart"
SOURCE="$PHOTOS${TRAIN_PHOTOS:+ + $TRAIN_PHOTOS}"
mkdir -p "$NOTES"
if [[ $FRESH == 1 ]]; then
    if [[ -f "$NOTES/tiny" ]]; then rm -rf "$OUT/tiny" "$NOTES/tiny"; fi
    if [[ -f "$NOTES/photos" && -f "$OUT/data/manifest.json" ]]; then rm -rf "$OUT/data"; fi
    if [[ -f "$NOTES/searches" ]]; then rm -rf "$OUT/searches" "$NOTES/searches"; fi
    rm -f "$NOTES/photos"
fi
if [[ -f "$OUT/data/manifest.json" ]]; then
    [[ -f "$NOTES/photos" ]] || fail "$OUT/data was not made by this script; choose another --out"
    if [[ "$(cat "$NOTES/photos")" != "$SOURCE" ]]; then
        fail "$OUT/data was made from other photographs ('$(cat "$NOTES/photos")'); add --fresh, or choose another --out"
    fi
fi

step 2 "tiny Qwen2.5-VL: $OUT/tiny"
if [[ -f "$NOTES/tiny" ]]; then
    say "already there"
else
    forensics tiny --out "$OUT/tiny"
    touch "$NOTES/tiny"
fi

step 3 "tampered and authentic images: $OUT/data"
if [[ -f "$OUT/data/manifest.json" ]]; then
    say "already there"
else
    printf '%s' "$SOURCE" >"$NOTES/photos"
    forensics synth --out "$OUT/data" --num-train 6000 --scene-variation 0.75 \
        ${PHOTOS:+--photos "$PHOTOS"} ${TRAIN_PHOTOS:+--train-photos "$TRAIN_PHOTOS"}
fi

overrides=(
    "output_dir=$(yaml "$OUT")"
    "model.path=$(yaml "$OUT/tiny")"
    "data.train=[{path: $(yaml "$OUT/data/train.jsonl")}]"
    "data.eval=[{path: $(yaml "$OUT/data/val.jsonl")}]"
)
if [[ -n "$LIMIT" ]]; then overrides+=("train.max_seconds=$LIMIT"); fi

step 4 "searches for repeated places, before training: $OUT/searches"
if [[ -n "$LIMIT" ]] && ((LIMIT < 240)); then
    say "left to the training steps in a run this short"
else
    overrides+=("train.search_cache=$(yaml "$OUT/searches")")
    [[ -e "$OUT/searches" ]] || touch "$NOTES/searches"
    forensics precompute --config configs/train/quickstart.yaml --share 0.25 --seconds 60 "${overrides[@]}"
    overrides+=("heads.noise_residual.similarity_share=0") # what has been searched is used, and that is all
fi

step 5 "training"
# The global batch is 8 on every machine: two CPU ranks of 4, or one rank of 8.
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    launch=(single_gpu.yaml "$OMP_NUM_THREADS") ranks=1
elif (($(cpu_count) > 1)); then
    launch=(cpu_ddp.yaml "$((OMP_NUM_THREADS > 1 ? OMP_NUM_THREADS / 2 : 1))") ranks=2
else
    launch=(cpu.yaml 1) ranks=1
fi
overrides+=("train.batch_size=$((8 / ranks))")
accelerate launch --quiet --config_file "configs/accelerate/${launch[0]}" --main_process_port 0 \
    --num_cpu_threads_per_process "${launch[1]}" sft_llm.py --config configs/train/quickstart.yaml --overwrite "${overrides[@]}"

step 6 "evaluation on images made from other photographs"
forensics evaluate --model "$OUT/best" --data "$OUT/data/eval.jsonl" --baseline-data "$OUT/data/train.jsonl" \
    --out "$OUT" --batch-size 16 --max-new-tokens 160

say "done in $((SECONDS - started)) s"
say "look at         $OUT/report.html"
say "loss curves     .venv/bin/tensorboard --logdir $OUT"
say "your own image  .venv/bin/forensics predict --model $OUT/best photo.jpg"
say "the real model  bash script/sft_llm.sh configs/train/stage1_3b.yaml model.path=/path/to/Qwen2.5-VL-3B-Instruct"
