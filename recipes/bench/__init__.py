"""`smol bench`: benchmarks that print what they measure."""
