"""Checked values → the arguments of Composer's Trainer; ``run.build_run`` is the one entry."""
