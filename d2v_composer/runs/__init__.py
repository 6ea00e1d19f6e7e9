"""Distillation, fine-tuning and detection: each run from its config to its report."""
