"""What each check is called and what to do about it, in English and Chinese; `{...}` are values of the finding."""

from __future__ import annotations

from typing import NamedTuple

from finetune.data.audit.findings import Finding, Leak


class Wording(NamedTuple):
    """Of one check: a line with the number found, and the next action."""

    title_en: str
    title_zh: str
    advice_en: str
    advice_zh: str


CHECKS: dict[str, Wording] = {
    "unreadable_record": Wording(
        "rows that are no records: {count}",
        "{count} 行无法读作记录",
        "repair or remove the rows named",
        "修复或删除所列的行",
    ),
    "unreadable": Wording(
        "images that cannot be opened: {count}",
        "{count} 张图像无法打开",
        "copy or download the files again, or remove the records",
        "重新复制或下载这些文件，或删除对应记录",
    ),
    "mask_size": Wording(
        "masks of another size than their image: {count}",
        "{count} 个掩膜与图像尺寸不一致",
        "check the pairing and EXIF rotation; resize with nearest-neighbour only if the picture is really the same",
        "检查配对与 EXIF 旋转；确认是同一张图后才可用最近邻缩放",
    ),
    "mask": Wording(
        "masks that cannot be used or contradict their label: {count}",
        "{count} 个掩膜无法使用或与标签矛盾",
        "255 = tampered, 0 = the rest; correct the label or the mask",
        "255 表示伪造，0 表示其余；更正标签或掩膜",
    ),
    "conversation": Wording(
        "problems in conversations: {count}",
        "对话中有 {count} 处问题",
        "training refuses these records: correct placeholders, tokens and turns as each line says",
        "训练会拒绝这些记录：按每行提示更正占位符、标记与轮次",
    ),
    "not_rendered": Wording(
        "records that cannot be rendered for the model: {count}",
        "{count} 条记录无法渲染为模型输入",
        "as each line says",
        "按每行提示处理",
    ),
    "too_long": Wording(
        "records of more than {limit} tokens: {count} (longest {max})",
        "{count} 条记录超过 {limit} 个 token（最长 {max}）",
        "raise data.max_length, lower data.max_pixels or shorten the text; image tokens are never cut",
        "提高 data.max_length、降低 data.max_pixels 或缩短文本；图像 token 不会被截断",
    ),
    "ungrouped": Wording(
        "records to which the group rule '{rule}' gives no group: {count} of {total}",
        "分组规则“{rule}”对 {total} 条记录中的 {count} 条给不出分组",
        "correct --group-by; a record without a group is a group of its own, and shared scenes are not seen",
        "更正 --group-by；没有分组的记录各自成组，因此看不出共享的场景",
    ),
    "wrong_extension": Wording(
        "files with the extension of another format: {count}",
        "{count} 个文件的扩展名与实际格式不符",
        "rename them; a converter that only renamed files may have touched one class only",
        "改名；只改名不转换的工具可能只处理过其中一类",
    ),
    "overlap_group": Wording(
        "groups in several splits: {count}",
        "{count} 个组同时出现在多个划分中",
        "divide by group (forensics prepare), so that no photo or scene is on both sides",
        "按组划分（forensics prepare），同一照片或场景不可跨划分",
    ),
    "overlap_bytes": Wording(
        "image files in several splits: {count}",
        "{count} 个图像文件同时出现在多个划分中",
        "remove the copies from one side, or give them one group and divide again",
        "从一侧删除副本，或设为同组后重新划分",
    ),
    "overlap_picture": Wording(
        "pictures in several splits, saved differently: {count}",
        "{count} 幅画面以不同文件出现在多个划分中",
        "look at them: give copies and tampered twins one group, and divide again",
        "请查看：副本与其篡改版本应设为同组后重新划分",
    ),
    "contradiction": Wording(
        "image files labelled both real and tampered: {count}",
        "{count} 个图像文件同时被标为真实与伪造",
        "keep the right label",
        "保留正确的标签",
    ),
    "copies_inside": Wording(
        "image files used by several records of one split: {count}",
        "{count} 个图像文件被同一划分内的多条记录使用",
        "fine where several questions ask about one image; otherwise remove the copies",
        "同一图像对应多个问题时正常；否则删除副本",
    ),
    "flat_pictures": Wording(
        "pictures too flat for a perceptual hash: {count}",
        "{count} 幅画面过于平坦，没有感知哈希",
        "they are compared by their bytes only",
        "它们只按文件字节比较",
    ),
    "leak_container": Wording(
        "{subject} alone gives the label away: AUROC {auroc:.2f} ({low:.2f}-{high:.2f})",
        "仅凭{subject}即可判断标签：AUROC {auroc:.2f}（{low:.2f}–{high:.2f}）",
        "save both classes the same way: same format, quality, size and metadata, drawn from one distribution",
        "两类图像须以相同方式保存：格式、质量、尺寸与元数据取自同一分布",
    ),
    "leak_combined": Wording(
        "container features together give the label away: AUROC {auroc:.2f} ({low:.2f}-{high:.2f})",
        "各文件特征合起来即可判断标签：AUROC {auroc:.2f}（{low:.2f}–{high:.2f}）",
        "save both classes the same way; the single features above show where to begin",
        "两类图像须以相同方式保存；可从上面的单项特征着手",
    ),
    "leak_name": Wording(
        "{subject} of the file alone gives the label away: AUROC {auroc:.2f} ({low:.2f}-{high:.2f})",
        "仅凭{subject}即可判断标签：AUROC {auroc:.2f}（{low:.2f}–{high:.2f}）",
        "harmless as long as no prompt holds a file name",
        "只要提示词中不出现文件名便无妨",
    ),
    "leak_content": Wording(
        "{subject} alone gives the label away: AUROC {auroc:.2f} ({low:.2f}-{high:.2f})",
        "仅凭{subject}即可判断标签：AUROC {auroc:.2f}（{low:.2f}–{high:.2f}）",
        "may be legitimate; usually real and tampered images show other scenes: add twins of the same photographs",
        "可能合理；多半是真伪图像取自不同场景：请加入同一照片的真伪成对样本",
    ),
    "leak_prompt": Wording(
        "the question alone gives the label away: AUROC {auroc:.2f} ({low:.2f}-{high:.2f})",
        "仅凭问题文字即可判断标签：AUROC {auroc:.2f}（{low:.2f}–{high:.2f}）",
        "draw the questions of both classes from one list; in comparisons vary which image is the tampered one",
        "两类样本的问题须取自同一列表；对比样本须变换伪造图像的位置",
    ),
    "leaks_not_judged": Wording(
        "label leaks are not judged: {count} labelled images, at least {minimum} of each class are needed",
        "未评估标签泄漏：共 {count} 张有标签图像，每类至少需要 {minimum} 张",
        "audit the whole set",
        "请审计完整数据集",
    ),
    "groups_of_one_class": Wording(
        "the {count} groups hold one class each, so leaks could not be judged on unseen groups",
        "{count} 个组各只含一类，无法在未见过的组上评估泄漏",
        "group by source photo and include authentic twins; the AUROCs below are of unseen images only",
        "按源照片分组并加入真实的成对样本；下列 AUROC 仅在未见过的图像上计算",
    ),
    "no_labels": Wording(
        "no image has a label", "没有任何标签", "add labels, or expect text only", "添加标签，否则只能训练文本"
    ),
    "one_class": Wording(
        "only one class: all {count} labelled images are {label_en}",
        "只有一类：{count} 张有标签图像全部为{label_zh}",
        "add the other class, or the model learns one answer for all",
        "加入另一类，否则模型只会给出同一个答案",
    ),
    "imbalance": Wording(
        "rare class: {share:.1%} of the images ({count}) are {label_en}",
        "{label_zh}图像只有 {count} 张（{share:.1%}）",
        "keep data.class_balanced: true, or add images of that class",
        "保持 data.class_balanced: true，或补充该类图像",
    ),
    "split_lacks_class": Wording(
        "split {subject} has no {label_en} image",
        "划分 {subject} 中没有{label_zh}图像",
        "no metric of both classes can be computed there; divide again",
        "无法在其上计算两类指标；请重新划分",
    ),
    "mask_tiny": Wording(
        "tampered regions below 0.1 % of their image: {count}",
        "{count} 个伪造区域不足图像的 0.1 %",
        "look at them: specks of annotation, or the wrong threshold",
        "请查看：可能是标注噪点或阈值有误",
    ),
    "mask_whole": Wording(
        "tampered regions above 90 % of their image: {count}",
        "{count} 个伪造区域超过图像的 90 %",
        "look at them: inverted masks, or wholly generated images without a region",
        "请查看：可能是掩膜反相，或整图生成而无局部区域",
    ),
    "mask_missing": Wording(
        "tampered images without a pixel target: {count}",
        "{count} 张伪造图像没有像素目标",
        "they train the verdict and the text only",
        "它们只训练判定与文本",
    ),
    "late_tokens": Wording(
        "answers that give the head's target away, a forensic token standing after text: {count}",
        "{count} 个回答泄露了检测头的目标：取证标记位于文本之后",
        "put the tokens first (layout tokens_first)",
        "将标记放在最前（tokens_first 布局）",
    ),
    "file_name_in_question": Wording(
        "questions that hold the name of an image file: {count}",
        "{count} 个问题中含有图像文件名",
        "remove it: names such as fake_001 or Tp_... tell the label",
        "请删除：fake_001、Tp_… 之类的名字会泄露标签",
    ),
    "verdict_in_question": Wording(
        "questions that state the verdict they ask for: {count}",
        "{count} 个问题直接说出了结论",
        "ask whether, do not state; or use both statements for both classes",
        "应当询问而非陈述，或两类都使用两种陈述",
    ),
}

FEATURE_NAMES: dict[str, tuple[str, str]] = {
    "extension": ("file extension", "扩展名"),
    "format": ("file format", "文件格式"),
    "mode": ("colour mode", "颜色模式"),
    "size": ("image size", "图像尺寸"),
    "width": ("image width", "图像宽度"),
    "height": ("image height", "图像高度"),
    "aspect": ("aspect ratio", "宽高比"),
    "pixels": ("number of pixels", "像素数"),
    "file_bytes": ("file length", "文件长度"),
    "bytes_per_pixel": ("bytes per pixel", "每像素字节数"),
    "jpeg_quality": ("JPEG quality", "JPEG 质量"),
    "jpeg_tables": ("JPEG quantisation tables", "JPEG 量化表"),
    "jpeg_subsampling": ("JPEG subsampling", "JPEG 色度抽样"),
    "jpeg_progressive": ("progressive JPEG", "渐进式 JPEG"),
    "metadata": ("metadata blocks", "元数据块"),
    "has_exif": ("presence of EXIF", "有无 EXIF"),
    "exif_tags": ("number of EXIF tags", "EXIF 字段数"),
    "exif_make": ("EXIF maker", "EXIF 厂商"),
    "exif_model": ("EXIF camera model", "EXIF 型号"),
    "exif_software": ("EXIF software", "EXIF 软件"),
    "exif_orientation": ("EXIF orientation", "EXIF 方向"),
    "name_prefix": ("first letters of the name", "文件名开头字母"),
    "name_words": ("words in the name", "文件名中的词"),
    "name_shape": ("pattern of the name", "文件名样式"),
    "name_length": ("length of the name", "文件名长度"),
    "name_digits": ("digits in the name", "文件名中的数字个数"),
    "mean_red": ("mean red", "红色均值"),
    "mean_green": ("mean green", "绿色均值"),
    "mean_blue": ("mean blue", "蓝色均值"),
    "std_red": ("spread of red", "红色标准差"),
    "std_green": ("spread of green", "绿色标准差"),
    "std_blue": ("spread of blue", "蓝色标准差"),
    "saturation": ("saturation", "饱和度"),
    "combined": ("all container features", "全部文件特征"),
    "prompt": ("wording of the question", "问题文字"),
}


def title(finding: Finding, language: str = "en") -> str:
    """The finding in one line."""
    wording = CHECKS[finding.check]
    place = 0 if language == "en" else 1
    subject = FEATURE_NAMES[finding.subject][place] if finding.subject in FEATURE_NAMES else finding.subject
    label = finding.details.get("label")
    names = {"label_en": ("real", "tampered")[label], "label_zh": ("真实", "伪造")[label]} if label is not None else {}
    return wording[place].format(**{**finding.details, **names}, count=finding.count, subject=subject)


def advice(finding: Finding, language: str = "en") -> str:
    """What to do about it."""
    return CHECKS[finding.check][2 if language == "en" else 3]


def feature_name(leak: Leak, language: str = "en") -> str:
    """What a row of the leak table is about."""
    return FEATURE_NAMES[leak.feature][0 if language == "en" else 1]
