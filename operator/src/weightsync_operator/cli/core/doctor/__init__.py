"""What the doctor looks for: pure functions from what was collected to findings."""
