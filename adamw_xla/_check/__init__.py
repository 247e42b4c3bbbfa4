"""The checks of user input, and the texts that a refused call is answered with.

Each error names the argument (for a leaf, its path), what was found and what to do. Checks take
values; that something *is* a config or a state is checked where these types stand. The drop-ins
have checks of their own.
"""
