"""What the program needs of other libraries beyond their documented interface, one module each."""
