#!/usr/bin/env bash
# Counts what the label files of region data hold: label_stats.json, and a label_map to paste. Flags: --help; docs/regions.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/regions_lib.sh"

run_regions scan "$@"
