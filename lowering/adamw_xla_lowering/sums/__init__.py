"""Sums of squares that leave the update itself."""
