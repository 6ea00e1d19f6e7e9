"""Training samples: their order, and the loader of a rank."""
