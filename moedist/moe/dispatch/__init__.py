"""How rows reach their experts and come back."""
