"""Align vision-language models to image-text preferences with ORPO, on Ray and DeepSpeed."""

__version__ = "0.2.0.dev0"
