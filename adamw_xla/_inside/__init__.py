"""One step inside: flatten, the step's numbers, norms, the update of a flat list of leaves."""
