"""Read samples wherever they are: in folders, MDS, Parquet files, tars, zips and stores."""
