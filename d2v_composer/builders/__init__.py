"""Runs of Composer's Trainer, from a checked config to the report: ``run.train_student``, ``finetune.finetune``."""
