"""The hosts of a launch: which they are, what they have, how they are reached."""
