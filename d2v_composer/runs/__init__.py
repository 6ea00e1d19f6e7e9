"""Run a checked config, up to the report: ``distill.train_student``, ``finetune.finetune``, ``detect.detect``."""
