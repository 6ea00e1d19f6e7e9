"""Sources into MDS shards, whole or in parts."""
