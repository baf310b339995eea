"""The command line, and many runs at once."""
