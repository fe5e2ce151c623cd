#!/usr/bin/env bash
# Writes conversations about the candidates: train.jsonl, val.jsonl, test.jsonl. Flags: --help; docs/regions.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/regions_lib.sh"

run_regions build "$@"
