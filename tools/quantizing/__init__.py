"""What ``tools.numerics`` is made of: formats, linears that are rounded, losses, figures, the report."""
