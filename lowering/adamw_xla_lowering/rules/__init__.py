"""JAX's transformations of the primitives: each rule gets the primitive handed in."""
