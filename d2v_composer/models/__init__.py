"""Teacher, student and what they share; only :mod:`.distillation` knows Composer."""
