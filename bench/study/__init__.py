"""What is claimed for batch norm, tried on real data: an experiment a file, run by `command`."""
