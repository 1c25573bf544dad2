"""Rankings of defenses over seeds, and their tables, files and figures."""
