"""Looks at every host of a launch, before and instead of one, and says what to do where something is wrong."""
