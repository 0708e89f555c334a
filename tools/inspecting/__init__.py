"""What tools.inspect looks at, a file each: what is measured, what is said of it, and its pictures."""
