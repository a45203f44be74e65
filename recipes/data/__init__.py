"""The data plan: which sample of which source is seen at which step."""
