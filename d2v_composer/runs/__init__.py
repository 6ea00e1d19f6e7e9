"""Runs of distillation, fine-tuning and evaluation."""
