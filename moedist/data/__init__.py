"""Where tokens come from: sources, a loader whose state is (seed, next sample), and writers of token files."""
