"""Run from a checked config to the report: ``distill.train_student``, ``finetune.finetune``, ``detect.detect``."""
