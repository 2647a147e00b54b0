"""What parts of a run cost, measured where it runs."""
