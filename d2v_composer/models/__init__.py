"""Teachers, students and their shared parts."""
