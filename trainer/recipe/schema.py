"""The JSON schema of recipes, by which editors complete and check them.

`python -m zeropipe.trainer.recipe.schema > recipes/recipe.schema.json` brings the shipped one up to date.
"""

from __future__ import annotations

import json
from typing import Any

from .recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) made from the pydantic model."""
    schema = Recipe.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ZeroPipe recipe"}


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
