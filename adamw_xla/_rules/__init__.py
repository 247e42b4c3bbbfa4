"""Rules of a config that are more than a number: for which leaves what holds, which steps count."""
