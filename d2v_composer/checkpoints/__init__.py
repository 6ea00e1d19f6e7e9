"""Read and write files of models and runs, without running code in the files."""
