"""What a run would need and how fast it could be, found before it is started: closed forms, and a run of fakes."""
