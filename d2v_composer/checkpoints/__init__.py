"""Weight files: read other programs' files safely, resume from our own, export students."""
