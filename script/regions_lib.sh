# Shared by scan_labels.sh, prepare_regions.sh and build_sft_jsonl.sh (source it): arguments to `forensics regions VERB`.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# run_regions VERB [CONFIG.yaml] [KEY=VALUE ...] [--OPTION ...]
run_regions() {
    local verb="$1" config="$ROOT/configs/data/regions.yaml" argument
    local -a changes=() options=()
    shift
    for argument in "$@"; do
        case "$argument" in
            -h | --help)
                say "usage: bash script/$(basename "$0") [CONFIG.yaml] [KEY=VALUE ...] [options of forensics regions $verb]"
                say "       paths are relative to the repository; default configs/data/regions.yaml / 路径相对于仓库根目录"
                bash "$ROOT/script/setup.sh" run && use_venv && exec forensics regions "$verb" --help ;;
            [a-z]*=*) changes+=("$argument") ;;
            *.yaml | *.yml) if [[ ${#options[@]} -gt 0 ]]; then options+=("$argument"); else config="$argument"; fi ;;
            *) options+=("$argument") ;;
        esac
    done
    bash "$ROOT/script/setup.sh" run
    use_venv
    go_offline
    cd "$ROOT"
    forensics regions "$verb" --config "$config" ${changes[@]+--set "${changes[@]}"} ${options[@]+"${options[@]}"}
}
