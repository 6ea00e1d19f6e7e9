"""Teacher, student and their shared parts; only :mod:`.distillation` imports Composer."""
