"""Loading of pipelines, and what differs between kinds of them, one file each."""
