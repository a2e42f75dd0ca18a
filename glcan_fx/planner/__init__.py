"""The choice of a plan: what the user asks for, and what is left open."""
