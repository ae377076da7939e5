"""What methods of one kind share: bases of guidance, measurements, rewards, maps of tokens."""
