"""Where a recorded network can be cut: trunk, units, taps, layouts."""
