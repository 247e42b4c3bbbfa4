"""One operation, several implementations: what each can run, and what all of them must do."""
