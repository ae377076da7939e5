"""What users give to a run: as the core takes it, where it begins, and what is refused."""
