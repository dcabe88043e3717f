"""Records on disk -> figures, a summary in the terminal, a fragment for a notebook."""
