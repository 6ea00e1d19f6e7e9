"""Order, load and augment training samples."""
