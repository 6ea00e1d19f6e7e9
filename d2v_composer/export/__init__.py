"""Export a student to a file that other programs load, and write the student's model card."""
