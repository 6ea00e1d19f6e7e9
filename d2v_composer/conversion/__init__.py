"""Image folders → MDS shards."""
