"""A plan for people: text, DOT, and a page."""
