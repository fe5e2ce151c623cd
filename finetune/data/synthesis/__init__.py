"""Tampering data sets made from authentic photographs; start at `generator.synthesize`."""

from finetune.data.synthesis.generator import SynthConfig, synthesize

__all__ = ["SynthConfig", "synthesize"]
