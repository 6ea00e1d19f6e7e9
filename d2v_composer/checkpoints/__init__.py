"""Files of weights: read those of other programs safely, resume from our own, export students."""
