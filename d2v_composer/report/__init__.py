"""Draw a run's report: one HTML file that needs no network, and its plots as PNG files."""
