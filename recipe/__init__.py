"""Fine-tune a 70B language model with QLoRA on the GPUs that people own."""

__version__ = "0.1.0"
