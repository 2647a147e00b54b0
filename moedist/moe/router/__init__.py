"""Who proposes which expert takes which token."""
