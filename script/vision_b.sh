#!/usr/bin/env bash
# Trains vision stage B: classifier and heat map on the frozen tower, started from stage A. Flags: --help; the method: docs/vision.md.
set -euo pipefail
STAGE=b
source "$(dirname "${BASH_SOURCE[0]}")/vision_lib.sh"

run_stage "$@"
