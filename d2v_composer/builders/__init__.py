"""Checked values → the arguments of Composer's Trainer."""
