#!/usr/bin/env bash
# Divides images by folder and chooses candidate regions: candidates_*.jsonl. Flags: --help; docs/regions.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/regions_lib.sh"

run_regions prepare "$@"
