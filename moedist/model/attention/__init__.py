"""How positions see each other."""
