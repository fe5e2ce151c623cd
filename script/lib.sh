# Shared by the other scripts (source it): repository root, messages, the virtual environment. Does nothing by itself.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf '==> %s\n' "$*"; }

fail() {
    printf '==> error: %s\n' "$*" >&2
    exit 1
}

# Puts the environment's programs (python, accelerate, ninja, ...) first on PATH; call it after setup.sh.
use_venv() {
    unset PYTHONHOME PYTHONPATH
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
}

# Local files only: nothing asks a model hub.
go_offline() { export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1; }

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

cpu_count() { getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# value "$@": what follows an option on the command line.
value() {
    [[ $# -ge 2 && -n "$2" && "$2" != --* ]] || fail "$1 needs a value"
    printf '%s' "$2"
}

# A path as seen from the folder the script was called in; empty stays empty.
absolute() { if [[ -z "$1" || "$1" == /* ]]; then printf '%s' "$1"; else printf '%s/%s' "$PWD" "$1"; fi; }

# folder OPTION DIR: the whole path of a folder that is there, or nothing where no DIR is given.
folder() {
    [[ -n "$2" ]] || return 0
    [[ -d "$2" ]] || fail "$1: no folder '$2'"
    (cd "$2" && pwd)
}

# Override values are YAML: quoted, any path is a string.
yaml() { printf "'%s'" "${1//\'/\'\'}"; }

is_seconds() { [[ "$1" =~ ^[1-9][0-9]*$ ]] || fail "--seconds is '$1', expected a whole number above 0"; }

# begin_run OUT: the environment made and entered, offline, in the repository's root, OUT made, a thread per core.
begin_run() {
    bash "$ROOT/script/setup.sh" run
    use_venv
    go_offline
    cd "$ROOT"
    mkdir -p "$1"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(cpu_count)}"
}
