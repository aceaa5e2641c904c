"""What is seen of a run while it goes: symptoms in words, a live display, trackers, a profile."""
