"""The loop of one rank, from its configuration to its exit code."""
