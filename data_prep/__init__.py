"""Corpus to token store. Never imports torch or deepspeed, so that a login node can prepare data."""
