"""What a step tells of itself."""
