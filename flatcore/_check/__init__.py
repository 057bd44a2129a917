"""Golden answers, and the check of every kernel against them."""
