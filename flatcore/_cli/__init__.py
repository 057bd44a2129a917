"""The commands behind ``python -m flatcore``."""
