"""Export a student as a program, verify the program, and write the student's model card."""
