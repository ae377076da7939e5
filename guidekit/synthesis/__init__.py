"""Models that draw from label maps, and their transfer to other label sets from a few images."""
