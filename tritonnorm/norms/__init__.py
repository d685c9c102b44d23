"""Group, layer, instance and RMS norm."""
