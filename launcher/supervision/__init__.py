"""A launch under way: hears every rank, notices what goes wrong, ends all of it, says why."""
