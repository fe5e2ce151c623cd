"""The model, its heads, adapters and loading."""

import warnings

# PEFT 0.21 asks a model for its checkpointing under the name that transformers 5.23 has replaced.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
