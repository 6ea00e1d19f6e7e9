"""Read a YAML and overrides into checked values."""
