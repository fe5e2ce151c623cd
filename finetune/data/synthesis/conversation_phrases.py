"""Wording of the generated conversations, Chinese and English: several phrasings of every question and answer.

Placeholders are filled in `conversations`: {image}, {images} where images stand, the others with what the provenance
holds.
"""

from __future__ import annotations

Phrases = dict[str, tuple[str, ...]]

PHRASES: dict[str, Phrases] = {
    "zh": {
        "verdict.ask": (
            "{image}这张图片是真是假？",
            "请判断这张图片是否经过篡改。{image}",
            "{image}帮我看看，这张照片被P过吗？",
            "这张图{image}是原图还是伪造的？",
        ),
        "verdict.fake": ("这是一张伪造图像，类型为{type}。", "经过篡改，篡改类型是{type}。", "是伪造图像（{type}）。"),
        "verdict.real": ("这是一张真实图像。", "未经篡改，是真实图像。", "是原图，没有发现伪造。"),
        "where.ask": ("篡改的位置在哪里？", "哪一部分被改动过？", "请指出被篡改的区域。"),
        "where.fake": ("被篡改的区域在{place}，{size}。", "改动在画面{place}，{size}。", "{place}被改过，{size}。"),
        "where.real": ("没有被篡改的区域。", "图中没有发现改动过的地方。", "无，篡改区域为空。"),
        "where.polygons": ("多边形坐标：{polygons}", "区域轮廓：{polygons}"),
        "why.ask": ("判断依据是什么？", "为什么这样判断？", "请说明理由。"),
        "why.fake": ("{finding}。", "依据：{finding}。", "因为{finding}。"),
        "why.real": ("{finding}。", "依据：{finding}。"),
        "sure.ask": ("你有多大把握？", "这个结论可靠吗？", "这个判断有多可靠？"),
        "sure.easy": ("把握很大，痕迹明显，取证难易：易。", "很有把握，改动容易看出；取证难易：易。"),
        "sure.medium": ("把握较大，痕迹不算明显，取证难易：中。", "比较有把握，需要仔细对比；取证难易：中。"),
        "sure.hard": ("把握有限，痕迹细微，取证难易：难。", "不能完全确定，改动很难看出；取证难易：难。"),
        "sure.real": ("把握较大，图像没有做过后期处理。", "比较有把握，拍摄之后图像未再处理。"),
        "sure.real_processed": (
            "有一定把握，但图像做过{history}，细微痕迹可能被掩盖。",
            "不能完全排除，图像经过{history}，轻微改动可能看不出来。",
        ),
        "history.ask": (
            "这张图还做过哪些整体处理？",
            "除了局部改动，整张图后来怎样处理过？",
            "图像的后期处理历史是什么？",
        ),
        "history.some": ("整张图做过{history}。", "后处理：{history}。"),
        "history.none": ("没有做过整体后处理。", "整张图没有后处理。"),
        "conclusion.ask": (
            "{image}只回答结论：真实还是伪造？",
            "这张图{image}的真伪？一句话回答。",
            "{image}只给结论，不要解释。",
            "是否经过篡改？{image}请直接回答。",
        ),
        "conclusion.fake": ("伪造图像。", "经过篡改。", "伪造。", "伪造图像（{type}）。"),
        "conclusion.real": ("真实图像。", "未经篡改。", "真实。"),
        "comparison.ask": (
            "{images}两张图片有什么区别",
            "{images}哪一张是伪造的？",
            "请比较这两张图片的真伪：{images}",
            "{images}这两张图里有没有经过篡改的？是哪一张？",
        ),
        "comparison.real_fake": (
            "前一张是真实图像, 后一张图像是伪造图像。后一张：{second}。",
            "前一张真实，后一张经过篡改：{second}。",
        ),
        "comparison.fake_real": (
            "前一张是伪造图像, 后一张图像是真实图像。前一张：{first}。",
            "前一张经过篡改：{first}；后一张真实。",
        ),
        "comparison.same": ("两张是同一画面。", "两张图内容相同，只差一处改动。"),
        "comparison.real_real": ("两张都是真实图像, 均未发现篡改痕迹。", "没有伪造的，两张都是真实图像。"),
        "comparison.fake_fake": (
            "两张都是伪造图像。前一张：{first}；后一张：{second}。",
            "两张都经过篡改：前一张，{first}；后一张，{second}。",
        ),
        "paraphrase.ask": (
            "{image}鉴定一下这张照片，结果写成JSON。",
            "这照片靠谱吗？{image}以JSON给出结论和依据。",
            "{image}作为图像取证专家，请输出真伪、篡改区域与证据（JSON）。",
            "帮忙验一下图{image}，要JSON格式。",
            "{image}有没有拼接、复制粘贴、擦除或修饰的痕迹？请用JSON回答。",
            "请对图像做真伪检测{image}，仅返回JSON。",
            "{image}这张图能当证据用吗？先判断是否被改过，用JSON输出。",
            "查一下{image}有没有PS痕迹，JSON返回。",
            "{image}哪里不对劲？若有篡改请标出，结果用JSON表示。",
            "真图还是假图？{image}按JSON格式说明。",
        ),
    },
    "en": {
        "verdict.ask": (
            "{image}Is this picture real or fake?",
            "Please judge whether this picture was tampered with.{image}",
            "{image}Has this photo been edited?",
            "Is this image {image} an original or a forgery?",
        ),
        "verdict.fake": (
            "It is a tampered image; the type is {type}.",
            "Tampered, by {type}.",
            "This is a forgery ({type}).",
        ),
        "verdict.real": (
            "It is an authentic image.",
            "Not tampered with: an authentic image.",
            "An original, no forgery found.",
        ),
        "where.ask": ("Where was it tampered with?", "Which part was changed?", "Point out the tampered region."),
        "where.fake": (
            "The tampered region is in the {place}, {size}.",
            "The change is in the {place} of the picture, {size}.",
            "The {place} was altered, {size}.",
        ),
        "where.real": (
            "No region was tampered with.",
            "Nothing in the picture was changed.",
            "None, the tampered region is empty.",
        ),
        "where.polygons": ("Polygon: {polygons}", "Outline of the region: {polygons}"),
        "why.ask": ("What is the evidence?", "Why do you think so?", "Please give your reasons."),
        "why.fake": ("Evidence: {finding}.", "The reason: {finding}.", "What shows it: {finding}."),
        "why.real": ("Evidence: {finding}.", "The reason: {finding}."),
        "sure.ask": ("How sure are you?", "Is this conclusion reliable?", "How reliable is this judgement?"),
        "sure.easy": (
            "Very sure, the traces are plain; difficulty: easy.",
            "Quite certain, the edit is easy to see; difficulty: easy.",
        ),
        "sure.medium": (
            "Fairly sure, the traces are not obvious; difficulty: medium.",
            "Rather sure, it takes a close comparison; difficulty: medium.",
        ),
        "sure.hard": (
            "Not very sure, the traces are faint; difficulty: hard.",
            "It cannot be said with certainty, the edit is hard to see; difficulty: hard.",
        ),
        "sure.real": (
            "Fairly sure, the picture was not processed afterwards.",
            "Rather sure, nothing was done to the picture after it was taken.",
        ),
        "sure.real_processed": (
            "Somewhat sure, but the picture went through {history}, which may hide faint traces.",
            "It cannot be ruled out: the picture went through {history}, a slight edit may not show.",
        ),
        "history.ask": (
            "How was the whole picture processed otherwise?",
            "Apart from local edits, what was done to the whole image?",
            "What is the processing history of the image?",
        ),
        "history.some": ("The whole picture went through {history}.", "Post-processing: {history}."),
        "history.none": ("The whole picture was not processed.", "No post-processing of the whole image."),
        "conclusion.ask": (
            "{image}Only the conclusion: real or fake?",
            "Is this image {image} authentic? One sentence.",
            "{image}Give the verdict only, no explanation.",
            "Tampered or not? {image}Answer directly.",
        ),
        "conclusion.fake": ("Tampered.", "A tampered image.", "Fake.", "A tampered image ({type})."),
        "conclusion.real": ("Authentic.", "Not tampered with.", "Real."),
        "comparison.ask": (
            "{images}What is the difference between the two pictures?",
            "{images}Which of them is fake?",
            "Please compare the authenticity of these two pictures: {images}",
            "{images}Was one of these pictures tampered with, and which?",
        ),
        "comparison.real_fake": (
            "The first is an authentic image, the second is a tampered image: {second}.",
            "The first is real; the second was tampered with: {second}.",
        ),
        "comparison.fake_real": (
            "The first is a tampered image, the second is an authentic image: in the first, {first}.",
            "The first was tampered with: {first}. The second is real.",
        ),
        "comparison.same": ("Both show the same picture. ", "Their content is the same but for one edit. "),
        "comparison.real_real": (
            "Both are authentic images, no trace of tampering in either.",
            "None is fake, both are authentic images.",
        ),
        "comparison.fake_fake": (
            "Both are tampered images. The first: {first}. The second: {second}.",
            "Both were tampered with: in the first, {first}; in the second, {second}.",
        ),
        "paraphrase.ask": (
            "{image}Examine this photo and write the result as JSON.",
            "Can this photo be trusted? {image}Give verdict and reasons in JSON.",
            "{image}As a forensic examiner, output authenticity, tampered regions and evidence (JSON).",
            "Check this picture {image} for me, JSON please.",
            "{image}Any trace of splicing, copying, erasing or retouching? Answer in JSON.",
            "Run an authenticity check on {image} and return JSON only.",
            "{image}Could this image serve as evidence? First judge whether it was altered, in JSON.",
            "Look for signs of editing in {image}, reply in JSON.",
            "{image}What is off here? Mark any tampering, as JSON.",
            "Genuine or fake? {image}Explain in JSON format.",
        ),
    },
}

TYPES: dict[str, dict[str, str]] = {
    "zh": {"splice": "拼接", "copy_move": "复制-移动", "erase": "擦除修补", "remove": "移除后内容识别填充",
           "inpaint_diffusion": "扩散模型局部生成", "retouch": "局部修饰"},
    "en": {"splice": "splicing", "copy_move": "copy-move", "erase": "erasing and inpainting",
           "remove": "removal with content-aware fill", "inpaint_diffusion": "generative inpainting",
           "retouch": "local retouching"},
}  # fmt: skip
"""Operation → its name in an answer."""

STEPS: dict[str, dict[str, str]] = {
    "zh": {"jpeg": "JPEG压缩（质量{quality}）", "double_jpeg": "两次JPEG压缩（质量{qualities[0]}与{qualities[1]}）",
           "webp": "WebP压缩（质量{quality}）", "resize": "缩放（{factor}倍）", "resize_back": "缩小到{factor}倍再放大",
           "noise": "整体加噪", "blur": "整体轻微模糊", "contrast": "对比度与亮度调整"},
    "en": {"jpeg": "JPEG compression (quality {quality})",
           "double_jpeg": "double JPEG compression (quality {qualities[0]}, then {qualities[1]})",
           "webp": "WebP compression (quality {quality})", "resize": "resizing by {factor}",
           "resize_back": "shrinking to {factor} and enlarging again", "noise": "added noise",
           "blur": "slight blur", "contrast": "a change of contrast and brightness"},
}  # fmt: skip
"""Post-processing step → its words, filled with its parameters."""
