"""YAML and overrides → checked values."""
