"""What is stored otherwise than it is computed with: state in words, params with a remainder."""
