# Shared by vision_eval.sh and vision_infer.sh (source it with VERB and CONFIG set): flags become `forensics vision` options.
# Does nothing by itself; a caller defines usage() and KEYS, which says what key of the settings a flag sets.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"


run_verb() {
    local flag value name dry=0 images=() settings=() options=() typed='^(classification_threshold|heatmap_threshold|batch_size|num_workers|seed)$'
    while (($#)); do
        flag="$1"
        case "$flag" in
            -h | --help) usage; exit 0 ;;
            --overwrite) options+=(--overwrite); shift; continue ;;
            --dry-run | --dry_run) dry=1; shift; continue ;;
            --chat) [[ $VERB == infer ]] || { usage >&2; fail "unknown option '$flag'"; }; options+=(--chat); shift; continue ;;
            --no-explain | --no_explain)
                [[ $VERB == infer ]] || { usage >&2; fail "unknown option '$flag'"; }
                settings+=("explain=false"); shift; continue ;;
            --*=*) value="${flag#*=}" flag="${flag%%=*}"; shift ;;
            --*)
                [[ $# -ge 2 && "$2" != --* ]] || { usage >&2; fail "$flag needs a value, or is not known"; }
                value="$2"; shift 2 ;;
            *=*)
                if [[ $VERB == infer && -e "$flag" ]]; then images+=("$flag"); else settings+=("$flag"); fi
                shift; continue ;;
            *)
                [[ $VERB == infer ]] || { usage >&2; fail "unknown argument '$flag'"; }
                images+=("$flag"); shift; continue ;;
        esac
        [[ -n "$value" ]] || fail "$flag needs a value"
        if [[ "$flag" == --config ]]; then CONFIG="$value"; continue; fi
        name="${KEYS[${flag//-/_}]:-}"
        [[ -n "$name" ]] || { usage >&2; fail "unknown option '$flag'"; }
        if [[ "$name" =~ $typed ]]; then settings+=("$name=$value"); else settings+=("$name=$(yaml "$value")"); fi
    done
    [[ "$CONFIG" == /* || -f "$CONFIG" ]] || CONFIG="$ROOT/$CONFIG"
    local command=(forensics vision "$VERB" "${images[@]}" --config "$CONFIG" "${options[@]}")
    if ((${#settings[@]})); then command+=(--set "${settings[@]}"); fi
    if [[ $dry == 1 ]]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        exit 0
    fi
    bash "$ROOT/script/setup.sh" run
    use_venv
    exec "${command[@]}"
}
