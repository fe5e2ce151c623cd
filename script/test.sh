#!/usr/bin/env bash
# The checks and the tests, with their own set-up; works offline once set up. Ends with pytest's closing line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/test.sh [--all] [--fast] [-n N] [pytest arguments]

  (nothing)   ruff, mypy, import-linter, then every test that is not marked slow, files spread over the cores
  --all       the slow tests too
  --fast      tests only, no linters
  -n N        N processes; 0 runs everything in one (for --pdb), by default one per core and at most 4
  others      handed to pytest, e.g.  bash script/test.sh --fast tests/losses -k dice

environment
  OMP_NUM_THREADS       threads of each process for torch and numpy (default 1; 2 with -n 0)
  FORENSICS_REAL_DATA   folder with real data for the tests marked real_data (default ../shared/data; skipped if absent)
TXT
}

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
run_all=0 lint=1 processes=$((cores < 4 ? cores : 4)) args=()
while (($#)); do
    case "$1" in
        --all) run_all=1 ;;
        --fast) lint=0 ;;
        -n) processes="${2:?-n needs a number}"; shift ;;
        -h | --help) usage; exit 0 ;;
        *) args+=("$1") ;;
    esac
    shift
done

bash "$ROOT/script/setup.sh" dev
use_venv
go_offline
threads=$((processes > 1 ? 1 : 2)) # as many processes with two threads each would crawl
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-$threads}"
cd "$ROOT"

if [[ $lint == 1 ]]; then
    failed=()
    check() { # every check runs, so that one call shows all there is to repair
        say "$*"
        "$@" || failed+=("$*")
    }
    check ruff check .
    check ruff format --check .
    check mypy finetune
    check lint-imports --no-logo
    if ((${#failed[@]})); then
        printf -v list '%s; ' "${failed[@]}"
        fail "these checks failed: ${list%; } (tests not run; --fast runs them alone)"
    fi
fi

# Long files have few tests: in their own order they are not all left to the end.
if ((processes > 1)); then args=(-n "$processes" --dist loadfile --no-loadscope-reorder "${args[@]+"${args[@]}"}"); fi
if [[ $run_all == 0 ]]; then args=(-m "not slow" "${args[@]+"${args[@]}"}"); fi
say "pytest ${args[*]+"${args[*]}"}"
exec python -m pytest "${args[@]+"${args[@]}"}"
