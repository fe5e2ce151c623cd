"""Makes stored data sets from any sources; start at `prepare.prepare`. Without torch."""

from finetune.data.preparation.config import PrepareConfig
from finetune.data.preparation.prepare import Prepared, prepare

__all__ = ["PrepareConfig", "Prepared", "prepare"]
