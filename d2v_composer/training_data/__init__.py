"""Order, decode and augment the training samples of a rank."""
