"""What a benchmark run leaves behind: its rows, the file they are kept in, and their comparison."""
