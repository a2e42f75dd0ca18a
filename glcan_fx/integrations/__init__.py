"""Glue for frameworks whose loop is theirs: each module imports its framework, so import the one that you use."""
