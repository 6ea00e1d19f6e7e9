"""Read and write files of models and runs; read other programs' files without running code."""
