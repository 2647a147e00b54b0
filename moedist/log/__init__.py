"""Where numbers go: metrics by their definitions, and the sinks that take them."""
