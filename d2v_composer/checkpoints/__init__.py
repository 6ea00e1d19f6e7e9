"""Files of weights: read foreign ones safely, resume from our own, export students."""
