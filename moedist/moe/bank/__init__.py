"""Where rows and weights meet."""
