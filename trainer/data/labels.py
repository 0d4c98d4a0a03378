"""Labels of tokens, as torch's cross entropy reads them."""

IGNORE = -100  # label of a token that is not trained on
