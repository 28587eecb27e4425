"""The instructed and the plain run as streams through the blocks; what the sites see on the way; generation."""
