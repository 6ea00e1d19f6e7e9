"""Convert a source to MDS shards, whole or in parts."""
