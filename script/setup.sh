#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints.txt. Idempotent: returns at once when nothing has changed.
# Every other script calls it. It changes nothing outside the repository folder (pip's cache aside).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/setup.sh [run|test|dev] [--force]

  run    what training, evaluation and inference need (default)
  test   and what the tests need
  dev    and ruff, mypy, import-linter, pre-commit
  --force  install again even if nothing has changed

environment
  PYTHON                       interpreter for the new .venv (3.10 to 3.13)
  FORENSICS_TORCH=cpu|cuda     which build of torch; without it cuda where nvidia-smi finds a GPU, else cpu
  PIP_INDEX_URL and pip's other settings are used as they are
TXT
}

LEVEL=run FORCE=0
for arg in "$@"; do
    case "$arg" in
        run | test | dev) LEVEL="$arg" ;;
        --force) FORCE=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown argument '$arg'" ;;
    esac
done
declare -A RANK=([run]=0 [test]=1 [dev]=2)

PY="$VENV/bin/python"
STAMP="$VENV/.forensics-setup" # two lines: hash of what was asked for, level

wanted_hash() {
    { cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; "$PY" -V; echo "$ROOT"; } | sha256sum | cut -d' ' -f1
}

is_current() {
    [[ $FORCE == 0 && -x "$PY" && -f "$STAMP" ]] || return 1
    local hash level
    { read -r hash && read -r level; } <"$STAMP" || return 1
    [[ -n "${RANK[$level]:-}" && "$hash" == "$(wanted_hash)" ]] || return 1
    ((RANK[$level] >= RANK[$LEVEL]))
}

if is_current; then exit 0; fi

# One installation at a time; the second caller waits and then finds the work done.
mkdir -p "$VENV"
if command -v flock >/dev/null 2>&1; then
    exec 9>"$VENV/.lock"
    flock -n 9 || { say "another setup is running, waiting for it"; flock 9; }
    if is_current; then exit 0; fi
fi

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local name
    if [[ -n "${PYTHON:-}" ]]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.10 to 3.13"
        echo "$PYTHON"
        return
    fi
    # The newest libraries need 3.11, so 3.10 comes last even where it is python3.
    for name in python3.11 python3 python3.12 python3.13 python3.10; do
        command -v "$name" >/dev/null 2>&1 && is_supported "$name" || continue
        if [[ $name == python3 && "$(python3 -c 'import sys; print(sys.version_info[1])')" == 10 ]]; then continue; fi
        echo "$name"
        return
    done
    fail "no Python 3.10 to 3.13 found on PATH; install one or set PYTHON=/path/to/python3.11"
}

# What a higher level has installed before stays pinned too.
stamped="$(sed -n 2p "$STAMP" 2>/dev/null || true)"
if [[ -n "$stamped" && -n "${RANK[$stamped]:-}" ]] && ((RANK[$stamped] > RANK[$LEVEL])); then LEVEL="$stamped"; fi

started=$SECONDS
if [[ -x "$PY" ]]; then
    if [[ -n "${PYTHON:-}" ]] && ! is_supported "$PYTHON"; then fail "PYTHON=$PYTHON is not a working Python 3.10 to 3.13"; fi
    if [[ -n "${PYTHON:-}" && "$("$PYTHON" -V 2>&1)" != "$("$PY" -V)" ]]; then
        fail "$VENV holds $("$PY" -V), PYTHON is $("$PYTHON" -V 2>&1); remove the folder to change the version"
    fi
    is_supported "$PY" || fail "$VENV holds $("$PY" -V 2>&1), expected Python 3.10 to 3.13; remove the folder and run again"
else
    base="$(find_python)"
    say "creating .venv with $("$base" -V)"
    "$base" -m venv "$VENV" || fail "cannot create $VENV; does this Python have the venv module (python3-venv on Debian)?"
fi
"$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip --upgrade >/dev/null

# The build of torch. Its CUDA packages are several gigabytes: without a GPU they are the last resort.
pip_install() { "$PY" -m pip install --disable-pip-version-check --progress-bar off "$@"; }
TORCH="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$ROOT/constraints.txt")"
torch_args=()
flavour="${FORENSICS_TORCH:-}"
[[ -z "$flavour" ]] && { if has_gpu; then flavour=cuda; else flavour=cpu; fi; }
installed="$("$PY" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)"
case "$flavour" in
    cuda)
        if [[ "$installed" == *+cpu ]]; then
            say "replacing the CPU build of torch by the CUDA build"
            "$PY" -m pip uninstall --quiet --yes torch
        fi
        say "torch $TORCH with CUDA (a large download the first time)"
        torch_args=("torch===$TORCH")
        ;;
    cpu)
        if [[ "$installed" == "$TORCH" || "$installed" == "$TORCH+cpu" ]]; then
            torch_args=("torch===$installed")
        elif [[ "$(uname -s)" != Linux ]]; then
            torch_args=("torch==$TORCH") # the only build there is without CUDA
        elif pip_install --quiet --dry-run --no-deps "torch===$TORCH+cpu" >/dev/null 2>&1; then
            say "torch $TORCH, CPU build"
            torch_args=("torch===$TORCH+cpu")
        elif pip_install --quiet --dry-run --no-deps --retries 1 --timeout 15 \
            --index-url https://download.pytorch.org/whl/cpu "torch===$TORCH+cpu" >/dev/null 2>&1; then
            say "torch $TORCH, CPU build from download.pytorch.org"
            torch_args=("torch===$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu)
        else # works on any machine, only larger
            say "no CPU build of torch $TORCH for $("$PY" -V) on the configured index or on download.pytorch.org: taking the" \
                "default build with CUDA (several GB). To avoid it: PIP_FIND_LINKS=FOLDER with a +cpu wheel, or another PYTHON"
            torch_args=("torch==$TORCH")
        fi
        ;;
    *) fail "FORENSICS_TORCH is '$flavour', expected cpu or cuda" ;;
esac

extra=""
if [[ $LEVEL != run ]]; then extra="[$LEVEL]"; fi
LOG="$VENV/setup.log"

# pip's own output goes to the log; this shows where it is.
show_progress() {
    awk '
        /^(Collecting|Requirement already satisfied)/ { if (++n % 40 == 0) print "==>   " n " packages looked up"; fflush() }
        /^ *Downloading .*\([0-9.]+ MB\)/ { mb = $0; sub(/.*\(/, "", mb); if (mb + 0 >= 20) print "==>   downloading " $2 " (" mb; fflush() }
        /^ *Building wheel for .*started/ { print "==>   building " $4; fflush() }
        /^Installing collected packages/ { print "==>   unpacking " NF - 3 " packages"; fflush() }'
}

say "installing the pinned packages ($LEVEL); about two minutes for a fresh environment with packages cached"
# DeepSpeed comes as source: without DS_BUILD_OPS=0 it would try to compile; its operators are built when first used.
# One pip call for everything, so that nothing installed later can replace torch. --no-compile: see the warm-up below.
if ! (
    cd "$ROOT"
    DS_BUILD_OPS=0 DS_ACCELERATOR="$([[ $flavour == cpu ]] && echo cpu || echo cuda)" \
        pip_install --no-compile -c constraints.txt "${torch_args[@]}" -e ".$extra" 2>&1
) | tee "$LOG" | show_progress; then
    grep -E '^ *(ERROR|error)' "$LOG" >&2 || tail -n 20 "$LOG" >&2
    fail "installation failed; pip's full output is in $LOG. Nothing is lost, run the script again"
fi

# Byte-compiling all 20 000 files takes a minute; importing what is used compiles just that, once.
say "first import of torch, transformers, peft, deepspeed"
env -u PYTHONDONTWRITEBYTECODE DS_ACCELERATOR=cpu "$PY" - >>"$LOG" 2>&1 <<'PY' || { tail -n 5 "$LOG" >&2; fail "the installed packages cannot be imported"; }
import importlib
import torch
for name in ("torch.utils.tensorboard", "torch._dynamo", "datasets", "accelerate.commands.launch", "deepspeed",
             "sklearn.metrics", "skimage.transform", "scipy.ndimage", "matplotlib.pyplot", "cv2", "yaml", "PIL.Image"):
    importlib.import_module(name)
PY
"$PY" -c 'from importlib.metadata import version as v; print("==> torch", v("torch"), "transformers", v("transformers"))'
printf '%s\n%s\n' "$(wanted_hash)" "$LEVEL" >"$STAMP"
say "environment ready in $((SECONDS - started)) s: .venv (activate with: source .venv/bin/activate)"
