"""zerofit: predict, choose, run and verify DeepSpeed ZeRO fine-tuning."""

__version__ = "0.1.0"
