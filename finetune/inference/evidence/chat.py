"""`forensics vision infer --chat IMAGE`: verdict and evidence of one image, then a dialogue about it in the terminal.

The evidence stands in the first question, so every later answer can lean on it; nothing is written to disk. Dialogues
of several images and models, without this evidence, are `forensics chat`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from finetune.config.vision_runs import VisionInferenceConfig, load_vision_config
from finetune.data.images import load_image
from finetune.errors import ConfigError
from finetune.inference.chat.dialogue import AnswerStreamer
from finetune.inference.chat.terminal import StreamWrapper
from finetune.inference.evidence.explaining import Explainer, Finding, prompts_of
from finetune.inference.evidence.inspection import find, load_models, named_images
from finetune.inference.evidence.prompts import CHAT_SYSTEM_PROMPTS, check_prompts, fill_prompt, literal_prompt
from finetune.inference.evidence.wording import evidence_text
from finetune.inference.queries import Query
from finetune.schema import ImageInput, Turn
from finetune.special_tokens import IMAGE_PLACEHOLDER

_QUIT = ("/quit", "/exit")


def chat_command(arguments: argparse.Namespace) -> int:
    """Handler of `forensics vision infer --chat`; exit status 0."""
    config = load_vision_config(arguments.config, arguments.overrides, VisionInferenceConfig)
    images = named_images(arguments.images or config.given_images)
    if len(images) != 1:
        raise ConfigError(f"--chat talks about one image, found {len(images)}; name one file")
    prompts_of(config)
    config.explain = True
    predictor, _ = load_models(config)
    ((name, path),) = images.items()
    picture = load_image(ImageInput(path=path), name)
    query = Query(name, (ImageInput(path=path),), ())
    (((prediction,)),) = predictor.predict_batch([query], [[picture]], with_text=False)
    finding = find(name, path, picture, prediction, config)
    print(f"{Path(path).name}: {evidence_text(finding.evidence, config.language)}")
    print("按 Ctrl-D 或输入 /quit 退出" if config.language == "zh" else "Ctrl-D or /quit leaves")
    EvidenceChat(Explainer(predictor, config), finding).run()
    return 0


class EvidenceChat:
    """A dialogue about one finding.

    Args:
        explainer: language model and settings; `chat_system_prompt` is the system prompt.
        finding: the image and its evidence, which goes into the first question.
    """

    def __init__(self, explainer: Explainer, finding: Finding) -> None:
        self.explainer, self.finding, config = explainer, finding, explainer.config
        system = config.chat_system_prompt or CHAT_SYSTEM_PROMPTS[config.language]
        self.turns: list[Turn] = [Turn("system", system)]

    def run(self) -> None:
        """Until /quit or the end of the input; a message that cannot be sent costs one line."""
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line in _QUIT:
                return
            if not line:
                continue
            try:
                self.ask(line)
            except ConfigError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print()

    def ask(self, message: str) -> str:
        """Send a message and print the answer as it comes; returns it. Both join the dialogue.

        Raises:
            ConfigError: control tokens or images in the message.
        """
        if IMAGE_PLACEHOLDER in message:
            raise ConfigError(f"the message holds {IMAGE_PLACEHOLDER}; this dialogue is about its one image")
        literal = literal_prompt(message)
        check_prompts([literal], 1, "message")
        explainer, predictor = self.explainer, self.explainer.predictor
        question = message
        if len(self.turns) == 1:
            num_images = len(explainer.pictures(self.finding))
            question = fill_prompt(literal, self.finding.evidence, explainer.config.language, num_images)
        width = shutil.get_terminal_size().columns
        wrapper = StreamWrapper(_write, width - 1, indent="  ")
        query = Query(self.finding.id, (), (*self.turns, Turn("user", question)))
        try:
            (answer,) = predictor.write(
                [query],
                [explainer.pictures(self.finding)],
                uses_adapter=explainer.config.use_lora_for_text,
                streamer=AnswerStreamer(predictor.bundle.tokenizer, None, wrapper.feed),
            )
        finally:
            wrapper.close()
        self.turns += [Turn("user", question), Turn("assistant", answer)]
        return answer


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
