#!/usr/bin/env bash
# Trains inspection reports (configs/train/reports_lora.yaml) under DeepSpeed ZeRO-3; arguments and environment: sft_llm.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    echo "usage: bash script/reports_zero3.sh [--resume] [key.sub=value ...]"
    echo "  overrides of configs/train/reports_lora.yaml, e.g. data.train=[data/processed/reports/train]"
    echo "  ACCELERATE_CONFIG=zero3_cpu tries it without GPUs; NUM_PROCESSES=N starts N processes"
    exit 0
fi
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-zero3}" exec bash "$here/sft_llm.sh" "$here/../configs/train/reports_lora.yaml" "$@"
