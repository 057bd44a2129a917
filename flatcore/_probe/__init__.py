"""The head of a user's model, measured while the model runs."""
