"""Runs of distillation and evaluation."""
