"""What turns a loss into a changed model, a file for each engine."""
