"""Examples to learn from: records in many formats to tokens with a mask of what is learnt."""
