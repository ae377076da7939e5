"""What a run leaves: its folder, its record, and how a notebook shows it."""
