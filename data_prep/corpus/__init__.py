"""What documents come from: files, slices of them, their formats, and the tasks they make."""
