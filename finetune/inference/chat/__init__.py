"""A dialogue with one or several models: in the terminal, or from a file."""
