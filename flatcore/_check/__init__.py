"""The check of every kernel against golden answers that ship in the package."""
