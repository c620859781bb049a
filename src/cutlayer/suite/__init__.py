"""Whether split training learns as well as unsplit training: many runs, their store, a report."""
