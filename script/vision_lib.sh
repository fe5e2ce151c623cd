# Shared by vision_a.sh, vision_b.sh and vision_c.sh (source it with STAGE set): their flags become overrides of a YAML.
# Does nothing by itself; training is script/sft_llm.sh's part.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

declare -A TITLE=(
    [a]="Stage A: fusion neck and classifier on the frozen vision tower / 阶段 A：冻结视觉塔，训练融合颈与分类头"
    [b]="Stage B: classifier and heat map, started from stage A / 阶段 B：从阶段 A 继续，联合训练分类与热图"
    [c]="Stage C: LoRA on the vision tower, started from stage B / 阶段 C：从阶段 B 继续，视觉塔加 LoRA"
)

usage() {
    cat <<TXT
${TITLE[$STAGE]}

usage: bash script/vision_$STAGE.sh --train_ann FILE [--data_root DIR] [flags] [KEY=VALUE ...]

  --train_ann FILE       training annotation: JSON list of image_path, mask_path, label, or any format of data/README.md
                         训练标注（image_path、mask_path、label 的 JSON，或 data/README.md 中的任何格式）
  --val_ann FILE         validation annotation / 验证标注
  --val_ratio R          without --val_ann: share of the training groups set aside (0.1) / 没有验证标注时按组划出的比例
  --data_root DIR        paths of the annotations are relative to it (default: the file's folder) / 标注中路径的根目录
  --out_dir DIR          results (runs/vision_$STAGE) / 输出目录
  --model_path PATH      Qwen2.5-VL: hub name or folder / 基座模型：模型库名称或本地目录
TXT
    if [[ $STAGE != a ]]; then
        cat <<'TXT'
  --clsA_dir DIR         folder of the stage before (A for B, B for C); its best model by AUROC is taken
                         上一阶段的输出目录（B 用 A 的，C 用 B 的），取其 AUROC 最好的模型
  --evi_alpha W          weight of the evidence term / 证据损失的权重
  --sparse_w W           weight of the map's sparsity on authentic images / 真实图像上热图稀疏损失的权重
  --contrast_w W         weight of the region contrast / 区域对比损失的权重
TXT
    fi
    cat <<'TXT'
  --epochs N             passes over the training data / 训练轮数
  --batch_size N         images per step and device / 每卡每步图像数
  --lr RATE              learning rate / 学习率
  --pos-weight W         weight of tampered images in the class term / 分类损失中篡改图像的权重
  --no-balance           draw images as they come, not both classes equally often / 不做类别均衡采样
  --accelerate-config C  a file, or a name under configs/accelerate / accelerate 配置
  --config YAML          another base configuration, e.g. configs/train/vision_a_tiny.yaml / 换用其他基础配置
  --resume               continue from the last checkpoint of --out_dir / 从断点继续
  --overwrite            --out_dir holds a run: move it aside (OUT_DIR/earlier) and start anew / 将旧结果移开后重新开始
  --dry-run              show the command, do not run it / 只显示命令
  KEY=VALUE              any key of the YAML, e.g. train.feature_cache=false / 配置中的任意键
TXT
}


# The model folder that a stage's output holds.
model_in() {
    local place
    for place in "$1" "$1/best_val_auc" "$1/best"; do
        if [[ -f "$place/heads.safetensors" ]]; then
            printf '%s' "$place"
            return
        fi
    done
    fail "--clsA_dir: no heads.safetensors in $1, $1/best_val_auc or $1/best; give the --out_dir of the stage before"
}

number() { [[ "$2" =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] || fail "$1 is '$2', expected a number"; }

run_stage() {
    local config="configs/train/vision_$STAGE.yaml" train="" val="" ratio="" root="" before="" model="" dry=0 resume=()
    local overrides=() extra=() flag value
    while (($#)); do
        flag="$1" value=""
        case "$flag" in
            -h | --help) usage; exit 0 ;;
            --resume) resume+=(--resume); shift; continue ;;
            --overwrite) resume+=(--overwrite); shift; continue ;;
            --no-balance | --no_balance) overrides+=("data.class_balanced=false"); shift; continue ;;
            --dry-run | --dry_run) dry=1; shift; continue ;;
            --*=*) value="${flag#*=}" flag="${flag%%=*}"; shift ;;
            --*)
                [[ $# -ge 2 && "$2" != --* ]] || { usage >&2; fail "$flag needs a value, or is not known"; }
                value="$2"; shift 2 ;;
            *=*) extra+=("$flag"); shift; continue ;;
            *) usage >&2; fail "unknown argument '$flag'" ;;
        esac
        [[ -n "$value" ]] || fail "$flag needs a value"
        case "${flag//-/_}" in
            __epochs) number "$flag" "$value"; overrides+=("train.epochs=$value" "train.max_steps=-1") ;;
            __batch_size) number "$flag" "$value"; overrides+=("train.batch_size=$value") ;;
            __lr) number "$flag" "$value"; overrides+=("train.learning_rate=$value") ;;
            __val_ratio) number "$flag" "$value"; ratio="$value" ;;
            __data_root) root="$value" ;;
            __train_ann) train="$value" ;;
            __val_ann) val="$value" ;;
            __clsA_dir) before="$value" ;;
            __out_dir) overrides+=("output_dir=$(yaml "$value")") ;;
            __model_path) model="$value" ;;
            __evi_alpha | __sparse_w | __contrast_w)
                [[ $STAGE != a ]] || fail "$flag weighs the heat map, which stage A has not; it belongs to stages B and C"
                number "$flag" "$value"
                case "${flag//-/_}" in
                    __evi_alpha) overrides+=("loss.evidence=$value") ;;
                    __sparse_w) overrides+=("loss.sparsity=$value") ;;
                    *) overrides+=("loss.contrast_region=$value") ;;
                esac ;;
            __pos_weight) number "$flag" "$value"; overrides+=("loss.cls_pos_weight=$value") ;;
            __accelerate_config) export ACCELERATE_CONFIG="$value" ;;
            __config) config="$value" ;;
            *) usage >&2; fail "unknown option '$flag'" ;;
        esac
    done
    [[ -z "$val" || -z "$ratio" ]] || fail "--val_ann and --val_ratio exclude each other; give one of them"
    if [[ -n "$train" ]]; then
        [[ -n "$val" || -n "$ratio" ]] || ratio=0.1
    elif [[ -n "$val$root" ]]; then
        fail "--val_ann and --data_root need --train_ann"
    fi
    source_of() { if [[ -n "$root" ]]; then printf '[{path: %s, root: %s}]' "$(yaml "$1")" "$(yaml "$root")"; else printf '[%s]' "$(yaml "$1")"; fi; }
    if [[ -n "$train" ]]; then overrides+=("data.train=$(source_of "$train")"); fi
    if [[ -n "$val" ]]; then overrides+=("data.eval=$(source_of "$val")" "data.val_ratio=0.0"); fi
    if [[ -n "$ratio" ]]; then overrides+=("data.val_ratio=$ratio" "data.eval=[]"); fi
    if [[ $STAGE == a ]]; then
        [[ -z "$before" ]] || fail "--clsA_dir: stage A is the first one, it starts from --model_path"
        if [[ -n "$model" ]]; then overrides+=("model.path=$(yaml "$model")"); fi
    else
        if [[ -n "$before" ]]; then
            before="$(model_in "$before")" || exit
            overrides+=("model.path=$(yaml "$before")" "model.base=null") # the base that the folder names
        fi
        if [[ -n "$model" ]]; then overrides+=("model.base=$(yaml "$model")"); fi
    fi
    [[ "$config" == /* || -f "$config" ]] || config="$ROOT/$config"
    [[ -f "$config" ]] || fail "--config: no file '$config'"
    local command=(bash "$ROOT/script/sft_llm.sh" "$config" "${resume[@]}" "${overrides[@]}" "${extra[@]}")
    if [[ $dry == 1 ]]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        exit 0
    fi
    exec "${command[@]}"
}
