"""Runs of distillation, fine-tuning, detection and evaluation."""
