"""What ``python -m flatcore bench`` measures: works, rivals, limits, answers."""
