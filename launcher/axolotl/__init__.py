"""Axolotl's YAML, turned into a recipe, a DeepSpeed JSON and the commands that prepare its data."""
