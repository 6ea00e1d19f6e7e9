"""Define the fields of YAMLs, and read a YAML and its overrides into checked values."""
