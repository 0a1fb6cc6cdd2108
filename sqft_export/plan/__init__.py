"""What a recipe will do: every fault, and the cost of every pass, before any work."""
