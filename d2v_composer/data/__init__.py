"""Images for training (streamed, unlabelled) and for retrieval (labelled, in memory)."""
