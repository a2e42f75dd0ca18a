"""A plan: every decision of the compiler as plain data, and as JSON."""
