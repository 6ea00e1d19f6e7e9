"""Decode, store, augment and batch images and audio."""
