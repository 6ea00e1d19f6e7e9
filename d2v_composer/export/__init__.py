"""Exported programs, their verification, and the card of a model."""
