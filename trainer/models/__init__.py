"""Parameter tables, and models built from them on any layout."""
