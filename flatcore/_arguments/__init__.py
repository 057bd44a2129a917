"""What may come in: of which library, dtype, shape, device and kind; and what is said where it may not."""
