#!/usr/bin/env bash
# Trains vision stage C: LoRA on the vision tower, started from stage B. Flags: --help; the method: docs/vision.md.
set -euo pipefail
STAGE=c
source "$(dirname "${BASH_SOURCE[0]}")/vision_lib.sh"

run_stage "$@"
