#!/usr/bin/env bash
# The checks and the tests, with their own set-up; works offline once set up. Ends with pytest's closing line.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/test.sh [--all] [--fast] [pytest arguments]

  (nothing)   ruff, mypy, import-linter, then every test that is not marked slow
  --all       the slow tests too
  --fast      tests only, no linters
  others      handed to pytest, e.g.  bash script/test.sh --fast tests/losses -k dice

environment
  OMP_NUM_THREADS       threads for torch and numpy (default 2)
  FORENSICS_REAL_DATA   folder with real data for the tests marked real_data (default ../shared/data; skipped if absent)
TXT
}

run_all=0 lint=1 args=()
for arg in "$@"; do
    case "$arg" in
        --all) run_all=1 ;;
        --fast) lint=0 ;;
        -h | --help) usage; exit 0 ;;
        *) args+=("$arg") ;;
    esac
done

bash "$ROOT/script/setup.sh" dev
use_venv
go_offline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-2}"
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

if [[ $run_all == 0 ]]; then args=(-m "not slow" "${args[@]+"${args[@]}"}"); fi
say "pytest ${args[*]+"${args[*]}"}"
exec python -m pytest "${args[@]+"${args[@]}"}"
