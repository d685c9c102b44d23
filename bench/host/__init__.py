"""What this library costs on the CPU, measured for real: imports, calls, and folded models."""
