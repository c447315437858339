"""Steps over time: the loop, what is seen of it on the way, its clock, numbers and signals."""
