"""Teacher, student and their shared parts; only :mod:`.distillation` and :mod:`.classification` import Composer."""
