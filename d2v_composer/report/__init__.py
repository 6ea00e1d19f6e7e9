"""Draw a run: one HTML file that needs no network, and its plots as PNG files."""
