"""Weight files: read those of other programs safely, resume from our own, export students."""
