"""Teachers, students and their shared parts; only :mod:`.classification` imports Composer."""
