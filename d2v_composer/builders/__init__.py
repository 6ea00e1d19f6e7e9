"""Turn a checked config into the arguments of Composer's Trainer; the entry point is ``run.build_run``."""
