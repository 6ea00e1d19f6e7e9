"""Images for training (streamed, unlabeled) and for retrieval (labeled, in memory)."""
