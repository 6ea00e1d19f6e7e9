"""Export a student as a program, verify what it computes, and write its model card."""
