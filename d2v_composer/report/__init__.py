"""Write HTML pages and plots about runs and evaluations."""
