#!/usr/bin/env bash
# Trains vision stage A: neck and classifier on the frozen tower. Flags: --help; the method: docs/vision.md.
set -euo pipefail
STAGE=a
source "$(dirname "${BASH_SOURCE[0]}")/vision_lib.sh"

run_stage "$@"
