"""Drawing many images in fixed blocks, by any number of processes."""
