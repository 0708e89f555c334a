"""What tools.bench measures, and how: one benchmark or one peer a file."""
