"""The machine around a run: files of others, hashes, locks and the terminal."""
