"""Samples in folders, MDS, Parquet files, tars, zips and stores."""
