"""Training entry point: `accelerate launch sft_llm.py --config configs/train/quickstart.yaml [key.sub=value ...]`."""

from finetune.cli import train_main

if __name__ == "__main__":
    train_main()
